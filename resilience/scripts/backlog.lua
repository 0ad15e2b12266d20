-- Stands before the scripts that move events between backlog sets; not a script of its own.
-- A set holds the ids of the undecided, unparked events of one tenant at one stage, scored by received_at (ms).
-- Writes are gathered, so that a batch costs one command per set and not one per event.
local SETS = 4
local gathered = {}
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
-- An entry of an earlier release does not say when its event was received: its age begins now.
local function received(ms) return ms == '0' and now_ms() or ms end
local function event_of(key) return string.sub(key, -32) end
local function gather(command, set, score, event)
  local id = command .. set
  local list = gathered[id]
  if not list then
    list = command == 'ZADD' and {command, set, 'NX'} or {command, set}
    gathered[id] = list
  end
  if score then list[#list + 1] = score end
  list[#list + 1] = event
  -- Lua cannot hand over more than some 8,000 arguments at once.
  if #list > 4000 then
    redis.call(unpack(list))
    gathered[id] = nil
  end
end
local function enter(set, score, event) gather('ZADD', set, score, event) end
local function leave(set, event) gather('ZREM', set, nil, event) end
local function write_sets()
  for _, list in pairs(gathered) do redis.call(unpack(list)) end
end

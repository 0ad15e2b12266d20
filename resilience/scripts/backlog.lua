-- Stands before the scripts that move events between backlog sets; not a script of its own.
-- A set holds the ids of the undecided, unparked events of one tenant at one stage, scored by received_at (ms).
-- Writes are gathered, so that a batch costs one command per set and not one per event.
-- Its key is the tenant's, which the call declares (and which holds the slot's hash tag), and the version it stands for.
local SETS = 4
local gathered = {}
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function event_of(key) return string.sub(key, -32) end
local function set_of(tenant, n) return tenant .. ':' .. n end
local function gather(command, tenant, n, score, event)
  if n >= SETS then return end
  local set = set_of(tenant, n)
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
local function enter(tenant, n, received, event)
  -- An entry of an earlier release does not say when its event was received: its age begins now.
  gather('ZADD', tenant, n, received == '0' and now_ms() or received, event)
end
local function leave(tenant, n, event) gather('ZREM', tenant, n, nil, event) end
-- Attempts begun ('c') and won ('a') per version. Readers add up over all tenants, so a call counts with its first one.
local attempts = {}
local function count(what, n) attempts[what .. n] = (attempts[what .. n] or 0) + 1 end
local function write_sets(tenant)
  for _, list in pairs(gathered) do redis.call(unpack(list)) end
  for field, number in pairs(attempts) do redis.call('HINCRBY', tenant .. ':c', field, number) end
end

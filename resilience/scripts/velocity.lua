-- Stands before the scripts that keep histories; not a script of its own.
-- A history is one string of samples of 68 bytes, ordered by time and event id: contracts.velocity.RECORD says which.
local SIZE = 68
local function time_at(blob, at) return (struct.unpack('>I8', blob, at + 1)) end
-- Bytes, never the server's collation, which `<` would ask.
local function earlier(a, b)
  for i = 1, 16 do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return false
end
-- The offset of a sample with this time and id, and true; else the offset where it belongs. New samples belong at the end.
local function place_of(blob, time, id)
  local at = #blob
  while at > 0 do
    local here = time_at(blob, at - SIZE)
    if here < time then return at, false end
    if here == time then
      local other = string.sub(blob, at - SIZE + 9, at - SIZE + 24)
      if other == id then return at - SIZE, true end
      if earlier(other, id) then return at, false end
    end
    at = at - SIZE
  end
  return 0, false
end
local function put(blob, at, record) return string.sub(blob, 1, at) .. record .. string.sub(blob, at + 1) end
local function over(blob, at, from, bytes)
  return string.sub(blob, 1, at + from) .. bytes .. string.sub(blob, at + from + #bytes + 1)
end
-- A verdict is 9 bytes: what it says, and since when (ms since 1900). The later holds; at one moment the worse.
local VERDICT, NONE = 43, string.rep('\0', 9)
local function outranks(a, b)
  local x, y = (struct.unpack('>I8', a, 2)), (struct.unpack('>I8', b, 2))
  if x ~= y then return x > y end
  return string.byte(a) > string.byte(b)
end
local function judged(blob, at, verdict)
  local held = string.sub(blob, at + VERDICT + 1, at + VERDICT + 9)
  return outranks(verdict, held) and over(blob, at, VERDICT, verdict) or blob
end
-- What is kept: not older than the newest allows, and not too many.
local function kept(blob, most, horizon)
  local from = math.max(#blob - most * SIZE, 0)
  if #blob > 0 then
    local oldest = time_at(blob, #blob - SIZE) - horizon
    while time_at(blob, from) < oldest do from = from + SIZE end
  end
  return from > 0 and string.sub(blob, from + 1) or blob
end
-- A server that was started again may have lost its last writes: another run is another epoch.
local function run_id() return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') end
-- Answers epoch, since when history is incomplete (ms, '' if it is whole), sequence. `write`: begin an epoch if need be.
local function epoch_of(key, fresh, now, write)
  local run = run_id()
  local m = redis.call('HMGET', key, 'e', 's', 'q', 'r')
  if m[1] and m[4] == run then return m[1], m[2] or '', tonumber(m[3] or 0) end
  local since = m[2] or now
  if write then redis.call('HSET', key, 'e', fresh, 's', since, 'r', run) end
  return fresh, since, tonumber(m[3] or 0)
end

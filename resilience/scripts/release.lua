-- Give locks back without advancing, and let parked events and those in doubt leave the backlog.
-- KEYS: one state key per lock, then one per leaving event, then the backlog of each tenant of the latter.
-- ARGV: locks, leaving events, one token per lock, then per leaving event: tenant's place, version, body digest.
-- A lock that is not mine, and an event that is elsewhere by now, are left alone; repeating is harmless.
local locks, leaving = tonumber(ARGV[1]), tonumber(ARGV[2])
for i = 1, locks do
  if redis.call('HGET', KEYS[i], 'l') == ARGV[2 + i] then redis.call('HDEL', KEYS[i], 'l', 'u', 'h') end
end
for i = 1, leaving do
  local key, a = KEYS[locks + i], 2 + locks + (i - 1) * 3
  local f = redis.call('HMGET', key, 'v', 'b')
  if f[1] == ARGV[a + 2] and f[2] == ARGV[a + 3] and tonumber(f[1]) < SETS then
    redis.call('HSET', key, 'g', 1)
    leave(KEYS[locks + leaving + ARGV[a + 1]], tonumber(f[1]), event_of(key))
  end
end
write_sets(KEYS[locks + leaving + 1])
return 1

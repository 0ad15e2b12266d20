-- Advance entries: store the next version and release the lock, if the lock is still mine.
-- KEYS: one state key per entry, then the backlog of each tenant: the event moves to its next stage's set, or leaves.
-- ARGV: entries, ttl_s, tombstone_ttl_s, then per entry: tenant's place, received_ms (0: not known), token,
-- expected version, expected digest, version, digest, body digest, stored, output, tombstone, status ('' unless the version is final).
-- Answers per entry 1 or 0 (LOST). Absent state is LOST: never create. A repeat after a lost reply answers 1.
local size, ttl, tombstone_ttl, answers = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), {}
for i = 1, size do
  local key, a = KEYS[i], 5 + (i - 1) * 12
  local token, digest = ARGV[a + 1], ARGV[a + 5]
  local f = redis.call('HMGET', key, 'l', 'v', 'd', 'k')
  if f[1] == token and f[2] == ARGV[a + 2] and f[3] == ARGV[a + 3] then
    redis.call('DEL', key)
    if ARGV[a + 10] ~= '' then redis.call('HSET', key, 't', ARGV[a + 10]) end
    if ARGV[a + 9] == '1' then
      redis.call('HSET', key, 'v', ARGV[a + 4], 'd', digest, 'b', ARGV[a + 6], 'k', token)
      redis.call('EXPIRE', key, tombstone_ttl)
    else
      redis.call('HSET', key, 'v', ARGV[a + 4], 'd', digest, 'b', ARGV[a + 6], 's', ARGV[a + 7], 'o', ARGV[a + 8], 'k', token)
      redis.call('EXPIRE', key, ttl)
    end
    local tenant, event = KEYS[size + ARGV[a - 1]], event_of(key)
    leave(tenant, tonumber(f[2]), event)
    count('a', f[2])
    enter(tenant, tonumber(ARGV[a + 4]), ARGV[a], event)
    answers[i] = 1
  elseif f[4] == token and f[2] == ARGV[a + 4] and f[3] == digest then
    answers[i] = 1
  else
    answers[i] = 0
  end
end
write_sets(KEYS[size + 1])
return answers

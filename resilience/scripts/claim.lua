-- Claim entries: the compare of the protocol's claim table, first row that fits, and the lock.
-- KEYS: one state key per entry, then the backlog of each tenant.
-- ARGV: entries, token, lease_ms, boot, ttl_s, then per entry: tenant's place, received_ms (0: not known), n, digest,
-- body digest, install_absent, stored bytes. What is claimed is in the backlog of its stage from then on.
-- Answers per entry {verdict, version, stored, output, owes_trail, lease_ms, holder}.
-- The token is the command's id: a repeat after a lost reply finds its own lock and answers the same.
local now = now_ms()
local size, token, lease, boot, ttl = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local answers = {}
for i = 1, size do
  local key, a = KEYS[i], 5 + (i - 1) * 7
  local n, digest, body, install_absent = tonumber(ARGV[a + 3]), ARGV[a + 4], ARGV[a + 5], ARGV[a + 6]
  local f = redis.call('HMGET', key, 'v', 'd', 'b', 'l', 'u', 'h', 'w', 'g')
  local v = f[1] and tonumber(f[1])
  local install = false
  if not v then
    if install_absent == '1' then install = true else answers[i] = {'absent', -1, '', '', 0, 0, ''} end
  elseif f[3] ~= body or v < n then
    install = true
  elseif v > n then
    local kept = redis.call('HMGET', key, 's', 'o')
    answers[i] = {'done', v, kept[1] or '', kept[2] or '', 0, 0, ''}
  elseif f[4] and f[4] ~= token and tonumber(f[5]) > now then
    answers[i] = {'locked', v, '', '', 0, tonumber(f[5]) - now, f[6] or ''}
  else
    redis.call('HSET', key, 'l', token, 'u', now + lease, 'h', boot)
    if f[8] then
      -- It had left (parked and replayed, or its publish was in doubt).
      redis.call('HDEL', key, 'g')
      enter(KEYS[size + ARGV[a + 1]], n, ARGV[a + 2], event_of(key))
    end
    count('c', n)
    local owes = f[7] and 1 or 0
    if f[2] == digest then
      answers[i] = {'go', v, '', '', owes, 0, ''}
    else
      answers[i] = {'twin', v, redis.call('HGET', key, 's'), '', owes, 0, ''}
    end
  end
  if install then
    -- Ends any lease on the old state; 'w' says that the whole trail is owed, whoever finishes this version.
    redis.call('DEL', key)
    redis.call('HSET', key, 'v', n, 'd', digest, 'b', body, 's', ARGV[a + 7], 'l', token, 'u', now + lease, 'h', boot, 'w', 1)
    redis.call('EXPIRE', key, ttl)
    for other = 0, SETS - 1 do
      if other ~= n then leave(KEYS[size + ARGV[a + 1]], other, event_of(key)) end
    end
    enter(KEYS[size + ARGV[a + 1]], n, ARGV[a + 2], event_of(key))
    count('c', n)
    answers[i] = {'installed', n, '', '', 1, 0, ''}
  end
end
write_sets(KEYS[size + 1])
return answers

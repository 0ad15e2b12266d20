-- Claim entries: the compare of the protocol's claim table, first row that fits, and the lock.
-- KEYS: one state key per entry.
-- ARGV: token, lease_ms, boot, ttl_s, then per entry: n, digest, body digest, install_absent, stored bytes.
-- Answers per entry {verdict, version, stored, output, owes_trail, lease_ms, holder}.
-- The token is the command's id: a repeat after a lost reply finds its own lock and answers the same.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local token, lease, boot, ttl = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local answers = {}
for i, key in ipairs(KEYS) do
  local a = 4 + (i - 1) * 5
  local n, digest, body, install_absent, bytes = tonumber(ARGV[a + 1]), ARGV[a + 2], ARGV[a + 3], ARGV[a + 4], ARGV[a + 5]
  local f = redis.call('HMGET', key, 'v', 'd', 'b', 'l', 'u', 'h', 'w')
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
    redis.call('HSET', key, 'v', n, 'd', digest, 'b', body, 's', bytes, 'l', token, 'u', now + lease, 'h', boot, 'w', 1)
    redis.call('EXPIRE', key, ttl)
    answers[i] = {'installed', n, '', '', 1, 0, ''}
  end
end
return answers

-- Reserve identities at the door: version 0 *is* the reservation, its bytes are kept.
-- KEYS: one state key per entry.  ARGV: ttl_s, then per entry: digest, body digest, stored bytes.
-- Answers per entry {verdict, version, stored bytes or ''}. Repeating a call answers 'repeat': harmless.
local ttl, answers = tonumber(ARGV[1]), {}
for i, key in ipairs(KEYS) do
  local a = 1 + (i - 1) * 3
  local found = redis.call('HMGET', key, 'v', 'b', 's')
  if not found[1] then
    redis.call('HSET', key, 'v', 0, 'd', ARGV[a + 1], 'b', ARGV[a + 2], 's', ARGV[a + 3])
    redis.call('EXPIRE', key, ttl)
    answers[i] = {'new', 0, ARGV[a + 3]}
  elseif found[2] ~= ARGV[a + 2] then
    answers[i] = {'conflict', tonumber(found[1]), ''}
  elseif found[1] == '0' then
    answers[i] = {'repeat', 0, found[3] or ''}
  else
    answers[i] = {'repeat', tonumber(found[1]), ''}
  end
end
return answers

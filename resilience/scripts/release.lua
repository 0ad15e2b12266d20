-- Give locks back without advancing. KEYS: one state key per entry. ARGV: one token per entry.
-- A lock that is not mine is left alone; repeating is harmless.
for i, key in ipairs(KEYS) do
  if redis.call('HGET', key, 'l') == ARGV[i] then redis.call('HDEL', key, 'l', 'u', 'h') end
end
return #KEYS

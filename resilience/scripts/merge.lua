-- Merge past samples into histories. What is there stays, and takes over the verdict if it is the later one.
-- KEYS: one history each. ARGV: most samples, horizon_ms, ttl_s, then per history its samples, in order, as one string.
local most, horizon, ttl = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
for i = 1, #KEYS do
  local blob, more = redis.call('GET', KEYS[i]) or '', ARGV[3 + i]
  if #blob == 0 or time_at(blob, #blob - SIZE) < time_at(more, 0) then
    blob = blob .. more
  else
    for from = 0, #more - SIZE, SIZE do
      local sample = string.sub(more, from + 1, from + SIZE)
      local at, found = place_of(blob, time_at(sample, 0), string.sub(sample, 9, 24))
      if found then
        blob = judged(blob, at, string.sub(sample, VERDICT + 1, VERDICT + 9))
      else
        blob = put(blob, at, sample)
      end
    end
  end
  redis.call('SET', KEYS[i], kept(blob, most, horizon), 'EX', ttl)
end
return #KEYS

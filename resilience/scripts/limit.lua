-- Take from rate limits: the Generic Cell Rate Algorithm (ITU-T I.371, virtual scheduling) on the server's clock.
-- KEYS: one limit per take; a limit may appear twice.  ARGV per take: cost, interval_us, span_us (see resilience.limiter).
-- Answers per take {allowed, retry_after_ms, remaining}. NOT harmless to repeat: each call counts.
local t = redis.call('TIME')
local now, answers = t[1] * 1000000 + t[2], {}
for i, key in ipairs(KEYS) do
  local a = (i - 1) * 3
  local cost, interval, span = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  local start = math.min(math.max(tonumber(redis.call('GET', key) or '0'), now), now + span)
  local after = start + cost * interval
  local late = after - span - now
  if late > 0 then
    answers[i] = {0, math.ceil(late / 1000), math.floor((now + span - start) / interval)}
  else
    -- Lua writes a number with 14 digits only; a limit that is earned again in full is worth no memory.
    redis.call('SET', key, string.format('%.0f', after), 'PX', math.ceil((after - now) / 1000))
    answers[i] = {1, 0, math.floor(-late / interval)}
  end
end
return answers

-- Stands before reserve.lua; not a script of its own. The Generic Cell Rate Algorithm (ITU-T I.371, virtual
-- scheduling) on the server's clock, the arithmetic of resilience.limiter. A limit's memory is one number, read and
-- written once per call however many events the call brings.
local arrivals, taken = {}, {}
local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end
-- In how many ms one more is allowed under this limit; 0: it is, and was taken.
local function take(key, interval, span, now)
  arrivals[key] = arrivals[key] or tonumber(redis.call('GET', key) or '0')
  local start = math.min(math.max(arrivals[key], now), now + span)
  local late = start + interval - span - now
  if late > 0 then return math.ceil(late / 1000) end
  arrivals[key] = start + interval
  taken[key] = true
  return 0
end
local function write_limits(now)
  for key in pairs(taken) do
    -- Lua writes a number with 14 digits only; a limit that is earned again in full is worth no memory.
    redis.call('SET', key, string.format('%.0f', arrivals[key]), 'PX', math.ceil((arrivals[key] - now) / 1000))
  end
end

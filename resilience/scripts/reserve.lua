-- Reserve identities at the door: version 0 *is* the reservation, its bytes are kept, its event enters the backlog.
-- KEYS: one state key per entry, then the backlog of each tenant, then the rate limit of each.
-- ARGV: entries, ttl_s, then per entry: tenant's place, received_ms, digest, body digest, stored bytes;
-- then per tenant: most undecided events ('' for no limit), interval_us ('' for no rate), span_us.
-- Answers per entry {verdict, version, stored bytes or '', ms to wait when 'limited'}.
-- Repeating a call answers 'repeat': harmless; a known identity uses up neither room nor rate.
local size, ttl, answers = tonumber(ARGV[1]), tonumber(ARGV[2]), {}
local room, now = {}, now_us()
local function undecided(tenant)
  local count = 0
  for n = 0, SETS - 1 do count = count + redis.call('ZCARD', set_of(tenant, n)) end
  return count
end
local function room_of(place, tenant)
  if room[place] then return room[place] end
  local limit = ARGV[size * 5 + place * 3]
  if limit == '' then return math.huge end
  local count = undecided(tenant)
  if count >= tonumber(limit) then
    local dead = string.format('(%.0f', now_ms() - ttl * 1000)
    -- What outlived its state belongs to no event any more.
    for n = 0, SETS - 1 do redis.call('ZREMRANGEBYSCORE', set_of(tenant, n), '-inf', dead) end
    count = undecided(tenant)
  end
  room[place] = tonumber(limit) - count
  return room[place]
end
local function wait_of(place)
  local interval = ARGV[size * 5 + place * 3 + 1]
  if interval == '' then return 0 end
  local tenants = (#KEYS - size) / 2
  return take(KEYS[size + tenants + place], tonumber(interval), tonumber(ARGV[size * 5 + place * 3 + 2]), now)
end
for i = 1, size do
  local key, a = KEYS[i], 2 + (i - 1) * 5
  local place = tonumber(ARGV[a + 1])
  local tenant = KEYS[size + place]
  local f = redis.call('HMGET', key, 'v', 'b', 's', 'g')
  if not f[1] then
    local left = room_of(place, tenant)
    -- Room first: what finds none uses up no rate.
    local wait = left > 0 and wait_of(place) or 0
    if left <= 0 then
      answers[i] = {'full', 0, '', 0}
    elseif wait > 0 then
      answers[i] = {'limited', 0, '', wait}
    else
      redis.call('HSET', key, 'v', 0, 'd', ARGV[a + 3], 'b', ARGV[a + 4], 's', ARGV[a + 5])
      redis.call('EXPIRE', key, ttl)
      enter(tenant, 0, ARGV[a + 2], event_of(key))
      if room[place] then room[place] = left - 1 end
      answers[i] = {'new', 0, ARGV[a + 5], 0}
    end
  elseif f[2] ~= ARGV[a + 4] then
    answers[i] = {'conflict', tonumber(f[1]), '', 0}
  elseif f[1] == '0' then
    if f[4] then
      -- It had left, and the door will send it once more. Whoever is known is not refused, but counts.
      redis.call('HDEL', key, 'g')
      enter(tenant, 0, ARGV[a + 2], event_of(key))
      if room[place] then room[place] = room[place] - 1 end
    end
    answers[i] = {'repeat', 0, f[3] or '', 0}
  else
    answers[i] = {'repeat', tonumber(f[1]), '', 0}
  end
end
write_sets(KEYS[size + 1])
write_limits(now)
return answers

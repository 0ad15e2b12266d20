-- Put verdicts on samples; one whose event is in no history waits under its own key.
-- KEYS: one verdict key per label, then each entity's history once. ARGV: labels, ttl_s, then per label: verdict (9 bytes),
-- place of the sample (24 bytes, '' if the event is not known), subject's place among the histories, counterparty's (0: none).
local size, ttl = tonumber(ARGV[1]), tonumber(ARGV[2])
local blobs, changed = {}, {}
for i = 1, #KEYS - size do blobs[i] = redis.call('GET', KEYS[size + i]) or '' end
for i = 1, size do
  local a = 3 + (i - 1) * 4
  local verdict, sample, seen = ARGV[a], ARGV[a + 1], false
  for s = 2, 3 do
    local place = tonumber(ARGV[a + s])
    if place > 0 then
      local at, found = place_of(blobs[place], time_at(sample, 0), string.sub(sample, 9, 24))
      if found then
        local now = judged(blobs[place], at, verdict)
        if now ~= blobs[place] then blobs[place], changed[place] = now, true end
        seen = true
      end
    end
  end
  if not seen then
    local waiting = redis.call('GET', KEYS[i])
    if not waiting or outranks(verdict, waiting) then redis.call('SET', KEYS[i], verdict, 'EX', ttl) end
  end
end
for place, _ in pairs(changed) do redis.call('SET', KEYS[size + place], blobs[place], 'KEEPTTL') end
return size

-- Observe events of one tenant: answer what is known of their entities, and record them.
-- KEYS: the tenant's epoch, then one verdict key per event, then each entity's history once.
-- ARGV: fresh epoch, now_ms, record (1 or 0), most samples, horizon_ms, ttl_s, events, then per event:
-- subject's place among the entities, its sample, counterparty's place (0: none), its sample.
-- Answers {epoch, since, {sequence per event}, {history per entity}}. Histories hold what this call added, and nothing
-- is forgotten in them yet: what an event saw are the samples of a lower sequence.
-- A repeat finds its sample, and so its sequence. A sample of sequence 0 was merged and observed by nobody: it gets one.
local record, size = ARGV[3] == '1', tonumber(ARGV[7])
local most, horizon, ttl = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local epoch, since, sequence = epoch_of(KEYS[1], ARGV[1], ARGV[2], record)
local base, entities = 1 + size, #KEYS - 1 - size
local blobs, changed, answers, began = {}, {}, {}, sequence
for i = 1, entities do blobs[i] = redis.call('GET', KEYS[base + i]) or '' end
for i = 1, size do
  local a = 8 + (i - 1) * 4
  local sides, mine = {}, 0
  for s = 0, 1 do
    local place, sample = tonumber(ARGV[a + s * 2]), ARGV[a + s * 2 + 1]
    if place > 0 then
      local at, found = place_of(blobs[place], time_at(sample, 0), string.sub(sample, 9, 24))
      sides[#sides + 1] = {place, sample}
      if found then mine = math.max(mine, (struct.unpack('>I8', blobs[place], at + 25))) end
    end
  end
  if not record then
    answers[i] = mine > 0 and mine or sequence + 1
  else
    if mine == 0 then
      sequence = sequence + 1
      mine = sequence
    end
    local waiting = redis.call('GET', KEYS[1 + i])
    for _, side in ipairs(sides) do
      local place, sample = side[1], side[2]
      local at, found = place_of(blobs[place], time_at(sample, 0), string.sub(sample, 9, 24))
      if not found then blobs[place] = put(blobs[place], at, sample) end
      blobs[place] = over(blobs[place], at, 24, struct.pack('>I8', mine))
      if waiting then blobs[place] = judged(blobs[place], at, waiting) end
      changed[place] = true
    end
    if waiting then redis.call('DEL', KEYS[1 + i]) end
    answers[i] = mine
  end
end
for place, _ in pairs(changed) do
  redis.call('SET', KEYS[base + place], kept(blobs[place], most, horizon), 'EX', ttl)
end
if sequence > began then redis.call('HSET', KEYS[1], 'q', sequence) end
return {epoch, since, answers, blobs}

-- KEYS: a tenant's epoch. ARGV: fresh epoch, now_ms, epoch that is whole now ('': only ask).
-- Answers {epoch, since when history is incomplete (ms, '' if it is whole)}, having begun an epoch if need be.
local epoch, since = epoch_of(KEYS[1], ARGV[1], ARGV[2], true)
if ARGV[3] ~= '' and ARGV[3] == epoch then
  redis.call('HDEL', KEYS[1], 's')
  since = ''
end
return {epoch, since}

#!lua
-- One batch, all or nothing: outputs, state and position together, by the owner alone.
--
-- KEYS[1]  the owner hash: epoch, instance, position
-- KEYS[2..] the keys that the packed batch names by number
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  the position that this batch starts from, as it was stored
-- ARGV[3]  the position after it, never the same bytes as before
-- ARGV[4]  the batch, msgpack: {outputs, appends, hashes, drops}
-- ARGV[5]  the instance of the caller: after a failover an epoch can be given out twice
--            outputs {key, keep, {id, ...}, {payload, ...}}   entries with one field, `data`
--            appends {key, keep, {{field, value, ...}, ...}}  entries with IDs made here
--            hashes  {key, {field, value, ...}}
--            drops   {key, ...}
--
-- MULTI does not roll back and a script that fails midway keeps what it wrote: so every check comes
-- first, and what follows cannot fail. The first line makes the server judge memory and read-only
-- before the script runs; without it a DEL would go through where the XADD after it may not.
-- IDs are compared as text: a Lua number would lose digits.

local CHUNK = 1000 -- unpack fails near 8,000 values
local LAST_POSSIBLE = '18446744073709551615-18446744073709551615'

local function parts(id)
  return string.match(id, '^(%d+)-(%d+)$')
end

local function digits_less(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end

local function id_less(a, b)
  local a_ms, a_seq = parts(a)
  local b_ms, b_seq = parts(b)
  if a_ms ~= b_ms then return digits_less(a_ms, b_ms) end
  return digits_less(a_seq, b_seq)
end

local function type_of(key)
  return redis.call('TYPE', key)['ok']
end

local function last_id(key)
  local info = redis.call('XINFO', 'STREAM', key)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
end

local stored = redis.call('HMGET', KEYS[1], 'epoch', 'position', 'instance')
if stored[1] ~= ARGV[1] or stored[3] ~= ARGV[5] or (stored[2] or '') ~= ARGV[2] then
  return {'MOVED', stored[1] or '', stored[2] or '', stored[3] or ''}
end

local batch = cmsgpack.unpack(ARGV[4])
local outputs, appends, hashes, drops = batch[1], batch[2], batch[3], batch[4]

for _, output in ipairs(outputs) do
  local key, kind = KEYS[output[1]], type_of(KEYS[output[1]])
  if kind ~= 'stream' and kind ~= 'none' then return {'TYPE', key, kind} end
  if kind == 'stream' and #output[3] > 0 and not id_less(last_id(key), output[3][1]) then
    return {'LAST_ID', key, last_id(key), output[3][1]}
  end
end
for _, append in ipairs(appends) do
  local kind = type_of(KEYS[append[1]])
  if kind ~= 'stream' and kind ~= 'none' then return {'TYPE', KEYS[append[1]], kind} end
  if kind == 'stream' and last_id(KEYS[append[1]]) == LAST_POSSIBLE then
    return {'LAST_ID', KEYS[append[1]], LAST_POSSIBLE, '*'}
  end
end
for _, hash in ipairs(hashes) do
  local kind = type_of(KEYS[hash[1]])
  if kind ~= 'hash' and kind ~= 'none' then return {'TYPE', KEYS[hash[1]], kind} end
end

for _, drop in ipairs(drops) do
  redis.call('DEL', KEYS[drop])
end
for _, output in ipairs(outputs) do
  local key, keep, ids, payloads = KEYS[output[1]], output[2], output[3], output[4]
  for i = 1, #ids do
    if keep > 0 then
      redis.call('XADD', key, 'MAXLEN', '~', keep, ids[i], 'data', payloads[i])
    else
      redis.call('XADD', key, ids[i], 'data', payloads[i])
    end
  end
end
for _, append in ipairs(appends) do
  local key, keep = KEYS[append[1]], append[2]
  for _, fields in ipairs(append[3]) do
    if keep > 0 then
      redis.call('XADD', key, 'MAXLEN', '~', keep, '*', unpack(fields))
    else
      redis.call('XADD', key, '*', unpack(fields))
    end
  end
end
for _, hash in ipairs(hashes) do
  local fields = hash[2]
  for i = 1, #fields, CHUNK do
    redis.call('HSET', KEYS[hash[1]], unpack(fields, i, math.min(i + CHUNK - 1, #fields)))
  end
end
redis.call('HSET', KEYS[1], 'position', ARGV[3])
return {'OK'}

-- wrk: sends the requests of the files named in its arguments in random order; prints one JSON line of figures.
-- wrk -s report.lua URL -- CONTENT_TYPE HEADER_LENGTH_OF_FILE=FILE ...   (0: the whole body is JSON)
local requests = {}

function init(arguments)
  math.randomseed(tonumber(tostring(requests):sub(8), 16) or 1)
  for index = 2, #arguments do
    local length, path = arguments[index]:match("^(%d+)=(.+)$")
    local file = io.open(path, "rb")
    local headers = { ["content-type"] = arguments[1] }
    if length ~= "0" then headers["inference-header-content-length"] = length end
    requests[#requests + 1] = wrk.format("POST", nil, headers, file:read("*a"))
    file:close()
  end
end

function request()
  return requests[math.random(#requests)]
end

function done(summary, latency, _)
  local e = summary.errors
  io.write(string.format(
    '\nREPORT {"answers": %d, "duration_s": %.6f, "bad_status": %d, "broken": %d, "p50_s": %.6f, "p90_s": %.6f, "p99_s": %.6f, "max_s": %.6f}\n',
    summary.requests, summary.duration / 1e6, e.status, e.connect + e.read + e.write + e.timeout,
    latency:percentile(50) / 1e6, latency:percentile(90) / 1e6, latency:percentile(99) / 1e6, latency.max / 1e6))
end

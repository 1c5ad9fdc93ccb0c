"""LitServe: its own batching, one worker on the CPU."""

import os

import litserve
from raw_session import Model


class Api(litserve.LitAPI):
    def setup(self, device):
        self.model = Model()

    def decode_request(self, request):
        return self.model.read(request)

    def batch(self, inputs):
        return inputs

    def predict(self, parts):
        return self.model.run_all(parts)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return self.model.write(output)


if __name__ == "__main__":
    # 1 ms is enough for what waits already to be taken along; LitServe has no way to batch without a window.
    api = Api(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, track_requests=False)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="warning")

"""Ask a prefill/decode pair without a router: each request goes to both servers, joined by one random room number.

usage: sglang_pair.py PREFILL_URL BOOTSTRAP_PORT DECODE_URL "some text"
"""

import json
import random
import sys
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def main() -> None:
    prefill, bootstrap_port, decode, text = sys.argv[1:5]
    body = {
        "text": text,
        "sampling_params": {"temperature": 0, "max_new_tokens": 32},
        "bootstrap_host": urllib.parse.urlparse(prefill).hostname,
        "bootstrap_port": int(bootstrap_port),
        "bootstrap_room": random.getrandbits(63),
    }
    with ThreadPoolExecutor(2) as both:
        answers = [both.submit(post, url, body) for url in (prefill, decode)]
        print(answers[1].result()["text"])
        answers[0].result()


if __name__ == "__main__":
    main()

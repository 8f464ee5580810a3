"""Ask the model in this container for a prediction: `python - BODY < ask.py`. Waits until its server answers."""

import sys
import time
import urllib.error
import urllib.request

URL = "http://127.0.0.1:8080/invocations"
SECONDS = 120

give_up = time.monotonic() + SECONDS
while True:
    request = urllib.request.Request(URL, sys.argv[1].encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310 - the URL stands above
            print(answer.read().decode().strip())
        break
    except urllib.error.HTTPError as error:
        sys.exit(f"the model answered {error.code}: {error.read().decode()}")
    except OSError as error:
        if time.monotonic() > give_up:
            sys.exit(f"the model's server does not answer: {error}")
        time.sleep(0.1)

"""Ask a running `partialhn serve --model models:/NAME@champion` for the label of an image.

Use: python examples/serve_client.py IMAGE [TASK [URL]]
"""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

if len(sys.argv) < 2:
    sys.exit("usage: serve_client.py IMAGE [TASK [URL]]")
image = Path(sys.argv[1]).read_bytes()
task = sys.argv[2] if len(sys.argv) > 2 else "auto"
url = sys.argv[3] if len(sys.argv) > 3 else "http://127.0.0.1:8000"

request = urllib.request.Request(f"{url}/predict?{urllib.parse.urlencode({'task': task})}", image)
try:
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)
except urllib.error.HTTPError as error:  # the server says what is allowed
    sys.exit(f"refused ({error.code}): {error.read().decode()}")
print(f"{answer['label']}  (probability {answer['probability']:.3f}, task {answer['task']}, "
      f"version {answer['version']})")

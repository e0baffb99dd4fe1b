"""A language model behind an OpenAI-compatible address, as vLLM, llama.cpp and the vendors offer it."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from megafish.errors import InputError

KEY = "OPENAI_API_KEY"
"""Environment variable with the key, where the address wants one."""
_ATTEMPTS = 4
_SECONDS = 120


@dataclass(frozen=True)
class Endpoint:
    """url: up to and without /chat/completions, such as http://localhost:8000/v1. model: what it calls the model."""

    url: str
    model: str

    def ask(self, prompt: str, *, temperature: float = 0.7) -> str:
        """The answer to a prompt. InputError where there is none after four attempts, or it is refused."""
        body = {"model": self.model, "temperature": temperature, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise InputError(f"--endpoint {self.url}: expected an address such as http://localhost:8000/v1")
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        fault = ""
        for attempt in range(_ATTEMPTS):
            time.sleep(2**attempt - 1)
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                    content = json.load(reply)["choices"][0]["message"]["content"]
                if isinstance(content, str) and content.strip():
                    return content.strip()
                fault = "an answer without text"
            except urllib.error.HTTPError as error:
                fault = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:  # trying again changes nothing
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                fault = str(getattr(error, "reason", error))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise InputError(f"{address}: no answer of the chat API ({error.__class__.__name__} {error})") from None
        raise InputError(f"{address}: {fault}: check the address, --model and {KEY}")

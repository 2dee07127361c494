"""How tests run a benchmark: by its command line, for the JSON document on its last line."""

from __future__ import annotations

import json


def last_line(main, arguments: list[str], monkeypatch, capsys) -> dict:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert main() == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])

"""Files of a test's own to open as a dataset."""

import json

from pictures import encoded, picture

PNG = encoded(picture())


def write(path, content=PNG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path, *rows):
    return write(path, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def captions_of(dataset):
    return {item.id: item.caption for item in dataset.items}

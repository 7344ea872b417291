"""Images in requests, beside requests without any."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

from image_bases import noise
from image_models import tiny_image_model
from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.models.base.find import BaseSource
from serving import running


def test_images_come_in_the_request_and_are_answered_beside_others(tmp_path):
    model, processor = tiny_image_model("llava")
    base = Base(
        model, processor.tokenizer, BaseSource("tiny-llava", tmp_path, "tiny-llava"), processor=processor
    )
    paths = [noise(tmp_path / f"{n}.png", 20 + 8 * n, 30, seed=n) for n in range(4)]
    likeliest = Sampling(temperature=0, max_new_tokens=6)
    here, sent = [], []
    for n in range(10):
        words = {"type": "text", "text": f"What is {n}?"}
        shown = [] if n % 5 == 4 else [paths[n % 4]]
        here.append(
            [{"role": "user", "content": [*({"type": "image", "path": str(p)} for p in shown), words]}]
        )
        urls = [f"data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}" for p in shown]
        images = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
        sent.append([{"role": "user", "content": [*images, words]}])
    expected = [reply(base, messages, likeliest) for messages in here]
    with running(base, {}, at_once=4) as server:
        client = server.client()

        def ask(messages):
            found = client.chat.completions.create(
                model="tiny-llava", messages=messages, temperature=0, max_tokens=6
            )
            return found.choices[0].message.content

        with ThreadPoolExecutor(5) as pool:
            assert list(pool.map(ask, sent)) == expected
    assert len({*expected}) > 3

"""An inference server: HTTP on uvloop in one process, an engine on the GPU in another, which it has spawned.

A client in the server asks over loopback, one request a step. A step's value: the answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import sys
from multiprocessing.connection import Connection

import aiohttp
import uvloop
from aiohttp import web
from progress import Progress, arguments

_SIDE = 512


def engine(device: str, requests: Connection) -> None:
    """Answer each request with a digest of a state on the GPU, which the request has changed."""
    import torch

    torch.manual_seed(11)
    factor = torch.randn(_SIDE, _SIDE).to(device) / _SIDE**0.5
    state = torch.randn(_SIDE, _SIDE).to(device)
    requests.send("ready")
    while True:
        state = torch.tanh(state @ factor + requests.recv())
        requests.send(hashlib.blake2b(state.cpu().numpy().tobytes(), digest_size=16).hexdigest())


async def serve() -> None:
    """Ask for as many steps as wanted."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=engine, args=(options.device, theirs), daemon=True)
    process.start()
    ready = await asyncio.to_thread(ours.recv)
    assert ready == "ready"

    async def ask(request: web.Request) -> web.Response:
        ours.send(float(request.query["by"]))
        return web.Response(text=await asyncio.to_thread(ours.recv))

    app = web.Application()
    app.router.add_get("/", ask)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    progress = Progress(options, lambda: "none")
    progress.ready(0)
    async with aiohttp.ClientSession() as client:
        for number in range(options.steps):
            async with client.get(f"http://127.0.0.1:{port}/", params={"by": str(number % 7)}) as answer:
                progress.step(await answer.text())
    progress.done()


if __name__ == "__main__":
    uvloop.install()
    sys.exit(asyncio.run(serve()))

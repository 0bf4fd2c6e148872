"""The command `serve`: a page on this machine that shows where a run's latents fire on a typed text, and what steering one does."""

import contextlib
import socket

from jsonargparse import Namespace

from metasae_lightning.cli.arguments import data_for, open_saes, places_of_arms
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.saes import device_of, select_hook
from metasae_lightning.evaluation.text_reader import TextReader
from metasae_lightning.server.typed_text import ServedSAEs


def serve(args: Namespace) -> int:
    """Load the SAEs and the language model, and answer requests until Ctrl-C."""
    try:
        import uvicorn

        from metasae_lightning.server.application import address_of, application
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise InputError("serve needs starlette and uvicorn: pip install 'metasae-lightning[serve]'") from error
    with listening_socket(args.host, args.port) as listening:
        served = served_saes(args)
        port, address = listening.getsockname()[1], address_of(args.host)
        if address is None or not address.is_loopback:
            print(f"everybody who can reach port {port} of {args.host} can read the page and use the model: there is no password")
        shown = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{shown}:{port}/ shows {', '.join(served.saes)}; Ctrl-C ends it", flush=True)
        config = uvicorn.Config(application(served, args.host), log_level="warning", server_header=False)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    return 0


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; one that cannot be used is an `InputError`. Port 0 takes a free one."""
    if not 0 <= port <= 65535:
        raise InputError(f"port must be in 0 to 65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"host and port: cannot listen at {host}, port {port}: {reason}") from error


def served_saes(args: Namespace) -> ServedSAEs:
    """The SAEs at `args.places`, all arms of a run among them, with the complete language model of the first one's data."""
    saes = open_saes(places_of_arms(args.places), None)
    data = data_for(saes[0], args)
    if not isinstance(data, ActivationsDataModule):
        raise InputError(f"{args.places[0]} reads activations without text, and serve reads a typed text")
    for sae in saes:
        select_hook(sae, data)
        sae.sae.to(device_of(data))
    model = data.language_model.complete()
    model.check_context_size(data.batching.context_size)
    return ServedSAEs(TextReader(model, data.batching), {sae.name: sae for sae in saes})

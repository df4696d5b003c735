"""Starts the embedded engine: python -m recipe.engines.embedded --model-path DIR --port N"""

import argparse
import asyncio
from functools import partial
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer

from recipe.config import Architecture
from recipe.data.tokenizer import load_decoder
from recipe.engines.embedded.app import Service, build_app
from recipe.engines.embedded.engine import EmbeddedEngine
from recipe.engines.embedded.forward import RowModel
from recipe.engines.embedded.fused import FusedModel
from recipe.engines.embedded.protocol import Limits
from recipe.engines.embedded.weights import WeightError, WeightTable
from recipe.system.errors import UserError, run_main


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    app = build_app()
    config = uvicorn.Config(
        app, host=arguments.host, port=arguments.port, log_level="warning", timeout_graceful_shutdown=1
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(app, config, arguments))


async def _serve(app: FastAPI, config: uvicorn.Config, arguments: argparse.Namespace) -> None:
    """Listens at once, and answers 503 until the model is loaded."""
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        service = await asyncio.to_thread(_load, arguments)
    except UserError:
        server.should_exit = True
        await serving
        raise
    app.state.service = service
    await serving
    service.engine.stop()


def _load(arguments: argparse.Namespace) -> Service:
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.model_path
    architecture = Architecture.from_checkpoint(folder)
    context_length = arguments.context_length or architecture.max_position_embeddings
    fused = FusedModel(architecture)
    model = RowModel(fused, context_length, keeps_experts=arguments.enable_return_routed_experts)
    weights = WeightTable(fused)
    try:
        weights.replace_all(folder)
    except WeightError as error:
        raise UserError(str(error)) from error
    tokenizer = load_decoder(folder) if (folder / "tokenizer.json").is_file() else None
    return Service(
        engine=EmbeddedEngine(
            model,
            weights,
            rows=arguments.max_running_requests,
            version=arguments.weight_version,
            decode=partial(_decode, tokenizer),
            threads=arguments.threads,
        ),
        limits=Limits(
            architecture.vocab_size,
            context_length,
            architecture.eos_token_ids,
            tokenizer,
            model.keeps_experts,
        ),
        model_path=folder,
    )


def _decode(tokenizer: Tokenizer | None, ids: list[int]) -> str:
    """The text that stop strings are looked for in."""
    return "" if tokenizer is None else str(tokenizer.decode(ids, skip_special_tokens=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True, help="Hugging Face checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-running-requests", type=int, default=256, help="sequences that are generated at once")
    parser.add_argument("--context-length", type=int, help="longest prompt and response; default: the model's")
    parser.add_argument("--weight-version", default="default", help="version of the weights in the checkpoint")
    parser.add_argument(
        "--enable-return-routed-experts", action="store_true", help="tell where tokens were routed, if asked"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that compute")
    return parser


if __name__ == "__main__":
    run_main(main)

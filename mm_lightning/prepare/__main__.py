"""Raw pictures and videos -> shards.

    python -m mm_lightning.prepare source=images source.path=FOLDER out=data/shards/images
    python -m mm_lightning.prepare source=videos source.path=FOLDER limit=20      # a dry run: report only

Sources, stages and options stand in conf/prepare/. Started again after an interruption, it goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mm_lightning.config import short_errors
from mm_lightning.prepare.engine import Preparation
from mm_lightning.prepare.report import PAGE_NAME, summary_line

logger = logging.getLogger("mm_lightning.prepare")

CONF = Path(__file__).resolve().parents[2] / "conf" / "prepare"
NOT_OPTIONS = ("source", "stages", "set_stages")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells which instructions it tries
    with short_errors():
        check_given(cfg)
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
        options = {name: value for name, value in config.items() if name not in NOT_OPTIONS}
        source = instantiate(cfg.source, _convert_="all")
        stages = {name: config.get(name) or {} for name in ("stages", "set_stages")}
        preparation = Preparation(source=source, **stages, **options, record=config)
        try:
            report = preparation.run()
        except KeyboardInterrupt:
            raise SystemExit("Interrupted. The same command goes on from here.") from None
    logger.info(summary_line(report))
    logger.info("Report: %s", preparation.report_folder / PAGE_NAME)
    if report["index"]:
        logger.info("Shards: %d in %s", len(report["index"]["shards"]), preparation.out)


def check_given(cfg: DictConfig) -> None:
    """
    Raises:
        ValueError: something that has no default was not given.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"give {', '.join(f'{name}=...' for name in missing)}; conf/prepare/ says what it means.")


if __name__ == "__main__":
    main()

"""Train MagicMirror. `python train.py experiment=stage1_image`, then `experiment=stage2_video`; see conf/."""

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from mm_lightning.config import (
    check_callbacks,
    check_config,
    check_devices,
    limit_threads,
    log_hyperparameters,
    mark_latest,
    register_resolvers,
    short_errors,
    told_to_stop,
)

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def train(cfg: DictConfig) -> None:
    with short_errors():
        check_config(cfg)
        limit_threads(cfg.num_threads)
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        datamodule = instantiate(cfg.data)  # looks at the shards and reads none
        module = instantiate(cfg.model)  # looks at every path and loads none
        if cfg.ckpt_path is not None:
            module.check_resume(cfg.ckpt_path)
        callbacks = [instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()]
        check_callbacks(callbacks, module)
        loggers = [instantiate(logger) for logger in (cfg.get("logger") or {}).values()]
        trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
        check_devices(trainer, cfg)
    log_hyperparameters(trainer, cfg)
    with told_to_stop():
        trainer.fit(module, datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    mark_latest(cfg.paths.run_dir)


if __name__ == "__main__":
    train()

from run_fixtures import config, finished, tokenizer, trained_once

__all__ = ["config", "finished", "tokenizer", "trained_once"]

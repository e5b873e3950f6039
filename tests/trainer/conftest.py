from run_fixtures import config, finished, saved_twice, tokenizer, trained_once

__all__ = ["config", "finished", "saved_twice", "tokenizer", "trained_once"]

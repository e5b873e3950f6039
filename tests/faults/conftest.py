from run_fixtures import config

__all__ = ["config"]

"""What several tests share. `tests` stands on pytest's path, so that processes that tests start find it too."""

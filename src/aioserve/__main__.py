"""``python -m aioserve package.module:app``."""

from aioserve._process.command import main

if __name__ == "__main__":
    main()

"""`python -m flowkernels`: the command line."""

import sys

if __name__ == "__main__":
    try:
        from flowkernels.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(main())

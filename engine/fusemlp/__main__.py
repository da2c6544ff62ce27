"""``python -m fusemlp`` is the ``fusemlp`` command."""

from fusemlp.cli import main

if __name__ == "__main__":
    main()

"""Run the ``hf-rope`` command as ``python -m hf_rope_ext``."""

from hf_rope_ext.cli.app import main

if __name__ == "__main__":
    main()

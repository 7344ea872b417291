"""``python -m rankfold``, which is what ``torchrun`` and ``accelerate launch`` start."""

from rankfold.cli.main import main

if __name__ == "__main__":
    main()

"""The command line: python -m torch_tqattn COMMAND."""

import argparse

from .doctor import command as doctor
from .fidelity import command, plan_command

COMMANDS = {"doctor": doctor, "eval": command, "plan": plan_command}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m torch_tqattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        subparser = commands.add_parser(name, help=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.exit(1, f"{parser.prog} {arguments.command}: {error}\n")


if __name__ == "__main__":
    main()

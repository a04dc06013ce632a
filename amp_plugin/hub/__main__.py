"""Push the folder of a finished run to the Hugging Face Hub: ``python -m amp_plugin.hub FOLDER OWNER/NAME``."""

from __future__ import annotations

from collections.abc import Sequence

from amp_plugin.arguments import Parser, path
from amp_plugin.command import run_command
from amp_plugin.hub import HubError, push_folder
from amp_plugin.text import tell


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, and push."""
    parser = Parser(prog="python -m amp_plugin.hub", description=__doc__)
    parser.add_argument("folder", type=path, help="Output folder of a finished run.")
    parser.add_argument("repo_id", help="OWNER/NAME, or NAME for the token's owner; made if it does not exist.")
    parser.add_argument("--private", action="store_true", default=None, help="Make the repository private, if new.")
    arguments = parser.parse_args(argv)
    tell(f"published: {push_folder(arguments.folder, arguments.repo_id, private=arguments.private).repo_url}")


if __name__ == "__main__":
    run_command(main, (FileNotFoundError, HubError, ValueError))

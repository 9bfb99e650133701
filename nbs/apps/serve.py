"""`make app`: the notebooks of this folder as pages, for whoever has the token, on this machine only.

Settings are in voila.json beside this file; options of Voilà on the command line come before them:

- A page is shown to whoever brings the token of its address, as JupyterLab does it. The address is printed.
- Requests must name this machine (`Host: 127.0.0.1` or `localhost`), so that no foreign page can pose as it.
- A kernel takes 600 MB. It ends when its page is closed, or was not used for half an hour; reload to go on.
"""

import threading
import webbrowser
from pathlib import Path

from traitlets import default
from voila.app import Voila

HERE = Path(__file__).resolve().parent


class Apps(Voila):
    """Voilà with the settings beside this file, and a browser that knows the token."""

    name = "voila"

    @default("config_file_paths")
    def _config_file_paths_default(self):
        return [str(HERE), *super()._config_file_paths_default()]

    @default("root_dir")
    def _default_root_dir(self):
        return str(HERE)

    def launch_browser(self) -> None:
        """Open the pages by way of a private file: arguments of a program can be read by other users."""
        address = f"{self.connection_url}?token={self.identity_provider.token}"
        page = Path(self.connection_dir, "open.html")  # a folder of this user's, removed at the end
        page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">\n', encoding="utf-8")
        threading.Thread(target=webbrowser.open, args=[page.as_uri()], daemon=True).start()


if __name__ == "__main__":
    Apps.launch_instance()

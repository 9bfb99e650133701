"""Sphinx's settings; `docs/build.py` writes the source folder that they are applied to."""

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]

project, author = SETTINGS["lib_name"], SETTINGS["author"]
copyright = SETTINGS["copyright"]
version = release = SETTINGS["version"]
language = "en"

extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax"]
root_doc = "index"
toc_object_entries = False
exclude_patterns = ["**/.ipynb_checkpoints"]
nb_execution_mode = "off"  # pages show what the notebooks hold
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_output_stderr = "remove"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 6
myst_heading_slug_func = "build.jupyter_anchor"
myst_links_external_new_tab = False
mathjax_path = "mathjax/tex-chtml.js"  # a copy that lies on the site
mathjax3_config = {"options": {"enableMenu": False}}
smartquotes = False
copybutton_selector = "div:not(.output) > div.highlight pre"
html_favicon = "_static/favicon.svg"
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_theme = "sphinx_book_theme"
html_title = project
html_last_updated_fmt = "%Y-%m-%d"
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "repository_url": SETTINGS["git_url"],
    "repository_branch": SETTINGS["branch"],
    "path_to_docs": "",
    "use_repository_button": True,
    "use_edit_page_button": True,
    "use_issues_button": True,
    "use_download_button": False,
    "launch_buttons": {
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
        "notebook_interface": "jupyterlab",
    },
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navigation_with_keys": False,
}


def setup(app):
    """What `build.py` has put beside the pages goes onto the site as it is."""
    app.connect(
        "config-inited", lambda app, config: config.html_static_path.append(str(Path(app.srcdir, "_static")))
    )

"""`MODULE:APP` as the App it names, relative to the current directory.

    shop.events:app  ──>  import shop.events (the directory one stands in comes first)  ──>  its `app`

Whatever is wrong with it is said in one sentence with the file and the line.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from trilogue import App, Router
from trilogue.cli.log import near
from trilogue.errors import BadOption, TrilogueError

GUARD = ": put what the script does under `if __name__ == '__main__':`"


def load_app(spec: str) -> App:
    """The App that `MODULE:APP` names; raises BadOption for a spec of another form, TrilogueError if there is none."""
    module_name, _, name = spec.partition(":")
    words = module_name.split(".")
    if not name.isidentifier() or not all(word.isidentifier() for word in words):
        raise BadOption(f"{spec!r} is not understood: expected MODULE:APP, as 'video:app' for the `app` in video.py")
    return _app_in(_load_module(module_name), name)


def _load_module(name: str) -> ModuleType:
    # The way `python -m` does it; a console script has its own folder there instead.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise TrilogueError(_no_such_module(name, error.name)) from error
        raise TrilogueError(_failed(name, error)) from error
    except SystemExit as error:
        raise TrilogueError(_failed(name, error) + GUARD) from error
    except Exception as error:
        raise TrilogueError(_failed(name, error) + (GUARD if "asyncio.run()" in str(error) else "")) from error


def _no_such_module(name: str, missing: str) -> str:
    here = Path.cwd()
    modules = [path.stem for path in here.glob("*.py")] + [path.parent.name for path in here.glob("*/__init__.py")]
    which = "" if missing == name else f" (there is no {missing!r})"
    where = f"{here} or among the installed packages{which}"
    return f"module {name!r} is not found in {where}:{near(name, modules)}".rstrip(":")


def _failed(name: str, error: BaseException) -> str:
    file, line = _place(error)
    return f"module {name!r} cannot be imported: {file}, line {line}: {type(error).__name__}: {error}"


def _place(error: BaseException) -> tuple[str, int]:
    """The file and line to look at: the last one of the user's own, the last one of all otherwise."""
    if isinstance(error, SyntaxError) and error.filename:
        return _short(error.filename), error.lineno or 1
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    frame = ([frame for frame in frames if _is_own(frame.filename)] or frames)[-1]
    return _short(frame.filename), frame.lineno or 1


def _is_own(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _app_in(module: ModuleType, name: str) -> App:
    found = getattr(module, name, None)
    if isinstance(found, App):
        return found
    where = f"module {module.__name__!r} ({_short(module.__file__ or '?')})"
    apps = [each for each, value in vars(module).items() if isinstance(value, App)]
    if isinstance(found, Router):
        raise TrilogueError(f"{name!r} in {where} is a Router: name the App that includes it{_choice(apps)}")
    what = "has no" if found is None else f"has a {type(found).__name__} and no App under the name"
    raise TrilogueError(f"{where} {what} {name!r}:{near(name, apps)}{_choice(apps)}")


def _choice(apps: list[str]) -> str:
    return f" its apps: {', '.join(apps)}" if apps else " it has no App"

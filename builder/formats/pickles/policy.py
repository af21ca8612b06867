"""Which names in a pickle mean that it holds code."""

from __future__ import annotations

import sys


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of the standard library that stand for plain data. Every other name of it is code that no
# checkpoint needs: a list of the dangerous ones could never be whole.
_PLAIN: dict[str, frozenset[str]] = {
    module: _words(names)
    for modules, names in {
        "builtins __builtin__": "bool bytearray bytes complex dict float frozenset int list long object range"
        " set slice str tuple type unicode xrange Ellipsis NoneType NotImplemented",
        "collections _collections": "ChainMap Counter OrderedDict UserDict UserList defaultdict deque",
        "copyreg copy_reg": "_reconstructor __newobj__ __newobj_ex__",
        "pathlib pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "typing": "Any Callable ClassVar Dict FrozenSet Generic Iterable List Literal Mapping Optional"
        " Sequence Set Tuple Type Union",
        "datetime": "date datetime time timedelta timezone",
        "array": "array _array_reconstructor",
        "itertools": "chain count cycle repeat",
        "logging": "Logger getLogger",
        "uuid": "SafeUUID UUID",
        "_codecs": "encode",
        "argparse": "Namespace",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "functools": "partial",
        "random": "Random",
        "re": "_compile",
        "time": "struct_time",
        "types": "NoneType SimpleNamespace",
        "zoneinfo": "ZoneInfo ZoneInfo._unpickle",
    }.items()
    for module in modules.split()
}

# Modules that one version of Python or another has had, and packages whose work is to run, load or fetch.
_CODE_ROOTS = frozenset(sys.stdlib_module_names) | _words(
    """
    __builtin__ __builtins__ StringIO Queue SocketServer _winreg asynchat asyncore cPickle cStringIO cgi
    cgitb chunk commands copy_reg crypt distutils dl dummy_thread dummy_threading ftplib gopherlib httplib
    imp imputil lib2to3 macpath mailcap md5 msilib new nis nntplib nt ntpath os2 ossaudiodev parser pipes
    popen2 posix posixfile riscos rexec sha sndhdr smtpd spwd sre symbol telnetlib thread uu urllib2 urlparse
    xdrlib

    IPython ansible apt bdb celery cffi click cloudpickle code dask dill docker execnet fabric fire fsspec
    gevent httpx aiohttp invoke jax.experimental.host_callback joblib jsonpickle jupyter_client klepto
    loky nose numba paramiko pathos pexpect pip pipenv pkg_resources plumbum ptyprocess psutil pwn py
    pycurl pytest requests sarge setuptools sh ssl tornado twisted uv uwsgi virtualenv websocket websockets
    win32api win32com win32process winreg xmlrpclib yaml zmq urllib3 invoke pyarrow.plasma
    """
)

# Parts of otherwise harmless packages that run, import, unpickle or fetch what they are given.
_CODE_PREFIXES = tuple(
    _words(
        """
    numpy.core._internal. numpy.ctypeslib. numpy.distutils. numpy.f2py. numpy.testing. numpy.lib.npyio.
    numpy.lib._npyio_impl. numpy.load numpy.fromfile numpy.memmap numpy.save numpy.compat.py3k.
    numpy.core.memmap numpy._core.memmap
    pandas.core.computation. pandas.eval pandas.io. pandas.read_ scipy.io. sympy.
    torch._C._ torch._dynamo. torch._inductor. torch._jit_internal. torch.distributed. torch.fx. torch.hub.
    torch.jit. torch.load torch.save torch.library. torch.multiprocessing. torch.ops. torch.package.
    torch.serialization.load torch.serialization._load torch.serialization._legacy_load
    torch.serialization._open torch.serialization.save torch.storage._load_from_bytes
    torch.testing. torch.utils.bottleneck. torch.utils.collect_env. torch.utils.cpp_extension.
    torch.utils.data.datapipes. torch.utils.model_dump torch.utils.model_zoo. torch.utils._config_module.
    torch.classes. torch.onnx. torch.profiler. torch.cuda._compile torch._utils_internal.
    torch.utils._import_utils. torch.utils.dlpack. torch.from_file torch.compile torch.export.
    safetensors.torch.load transformers.pipeline transformers.utils.import_utils. huggingface_hub.
    """
    )
)

# Modules that may not be reached through another one's attributes, and attributes that lead out of it.
_HIDDEN = _words(
    "os sys subprocess builtins posix nt pickle marshal ctypes importlib shutil socket runpy pty io"
    " _pickle codecs operator pdb bdb code types threading multiprocessing urllib requests"
)
_CALLABLES = _words(
    """
    eval exec execfile compile open input breakpoint exit quit getattr setattr delattr globals locals vars
    system popen spawn fork execv execve execl startfile call check_call check_output getoutput
    getstatusoutput Popen import_module loads read_pickle runcode runsource runctx run_code run_path
    run_module runstring execWrapper safe_eval literal_eval urlopen urlretrieve attrgetter itemgetter
    methodcaller load_library LoadLibrary CDLL dlopen rmtree unlink rmdir chmod
    """
)


def holds_code(module: str, name: str) -> bool:
    """Whether a pickle that refers to `name` of `module` holds code, or hides that it does.

    Names of the standard library are code unless they stand for plain data; names of other packages are
    plain unless they are known to run, import, unpickle or fetch things. None of them is ever imported
    either way: the answer decides whether the file is read at all.
    """
    plain = _PLAIN.get(module)
    if plain is not None and name in plain:
        return False
    root = module.partition(".")[0]
    if root in _CODE_ROOTS or module in _CODE_ROOTS:
        return True
    parts = f"{module}.{name}".split(".")
    if any(p.startswith("__") and p.endswith("__") for p in parts[1:]):
        return True
    qualified = name.split(".")
    if qualified[-1] in _CALLABLES or (len(qualified) > 1 and not _HIDDEN.isdisjoint(qualified)):
        return True
    if "os" in parts[1:] or "subprocess" in parts[1:] or "builtins" in parts[1:] or "sys" in parts[1:]:
        return True
    return f"{module}.{name}".startswith(_CODE_PREFIXES)

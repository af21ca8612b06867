"""Which names in a pickle mean that it holds code."""

from __future__ import annotations

import sys


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of the standard library that stand for plain data. Every other name of it is code that no
# checkpoint needs: a list of the dangerous ones could never be whole.
_PLAIN = {
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

# The standard library of this Python, what others had, and packages whose work is to run, load or fetch.
_CODE_ROOTS = sys.stdlib_module_names | _words(
    """
    Queue SocketServer StringIO __builtin__ __builtins__ _winreg aifc asynchat asyncore audioop cPickle
    cStringIO cgi cgitb chunk commands copy_reg crypt distutils dl dummy_thread dummy_threading formatter
    gopherlib httplib imghdr imp imputil lib2to3 macpath mailcap md5 msilib new nis nntplib nt ntpath os2
    ossaudiodev parser pipes popen2 posix posixfile posixpath pydoc_data rexec sha smtpd sndhdr spwd sre
    sunau symbol telnetlib thread urllib2 urlparse uu xdrlib xmlrpclib

    IPython aiohttp cffi click cloudpickle dask dill docker execnet fabric fire fsspec gevent gradio httpx
    huggingface_hub invoke joblib jsonpickle jupyter_client klepto loky nose paramiko pathos pexpect pip
    pkg_resources plumbum psutil ptyprocess pwn pycurl pytest requests sarge setuptools sh sympy tornado
    twisted urllib3 uvicorn virtualenv websocket websockets win32api win32com win32process yaml zmq
    """
)

# Parts of packages otherwise harmless that run, compile, unpickle or fetch what they are given.
_CODE_PREFIXES = tuple(
    _words(
        """
        numpy._core.memmap numpy.compat. numpy.core.memmap numpy.ctypeslib. numpy.distutils. numpy.f2py.
        numpy.fromfile numpy.lib._npyio_impl. numpy.lib.npyio. numpy.load numpy.memmap numpy.save
        numpy.testing.
        pandas.core.computation. pandas.eval pandas.io. pandas.read_ safetensors.torch.load scipy.io.
        torch._dynamo. torch._inductor. torch._jit_internal. torch.classes. torch.compile
        torch.distributed.elastic. torch.distributed.launch. torch.distributed.rpc. torch.distributed.run.
        torch.export. torch.from_file torch.fx. torch.hub. torch.jit. torch.library. torch.load
        torch.multiprocessing. torch.ops. torch.package. torch.save torch.serialization._legacy_load
        torch.serialization._load torch.serialization._open torch.serialization.load
        torch.serialization.save torch.storage._load_from_bytes torch.testing.
        torch.utils._config_module. torch.utils.bottleneck. torch.utils.collect_env.
        torch.utils.cpp_extension. torch.utils.data.datapipes. torch.utils.dlpack. torch.utils.model_dump
        torch.utils.model_zoo. transformers.pipeline transformers.utils.import_utils.
        """
    )
)

# Modules that lead out of the one that they are an attribute of.
_DOORS = _words(
    "_pickle builtins code codecs ctypes importlib io marshal multiprocessing nt operator os pdb pickle posix"
    " pty requests runpy shutil socket subprocess sys threading types urllib"
)
_DOORS_ANYWHERE = _words("builtins os subprocess sys")

# What runs or opens things, wherever it is said to come from.
_RUNNERS = _words(
    """
    CDLL LoadLibrary Popen __import__ attrgetter breakpoint call check_call check_output chmod compile
    delattr dlopen eval exec execWrapper execfile execl execv execve exit fork getattr getoutput
    getstatusoutput globals import_module input itemgetter load_library loads locals methodcaller open popen
    quit read_pickle rmdir rmtree run_code run_module run_path runcode runctx runsource runstring setattr
    spawn startfile system unlink urlopen urlretrieve vars
    """
)


def holds_code(module: str, name: str) -> bool:
    """Whether a pickle that refers to `name` of `module` holds code, or hides that it does.

    Names of the standard library are code unless they stand for plain data; names of other packages are
    plain unless they are known to run, import, unpickle or fetch things. None of them is ever imported
    either way: the answer only decides whether the file is read at all.
    """
    if name in _PLAIN.get(module, ()):
        return False
    qualified = name.split(".")
    inner = [*module.split(".")[1:], *qualified]
    return (
        module.partition(".")[0] in _CODE_ROOTS
        or qualified[-1] in _RUNNERS
        or not _DOORS_ANYWHERE.isdisjoint(inner)
        or (len(qualified) > 1 and not _DOORS.isdisjoint(qualified))
        or any(part.startswith("__") and part.endswith("__") for part in inner)
        or f"{module}.{name}".startswith(_CODE_PREFIXES)
    )

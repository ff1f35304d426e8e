"""Kernels for the notebooks, forked from a process that has imported what takes long.

To start Python, torch and matplotlib takes longer than most notebooks do, and so it is done once.
A notebook finds them imported, and everything else as in any other kernel.
"""

import asyncio
import gc
import multiprocessing
import os
import threading
from importlib.metadata import EntryPoint

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

PRELOADED = [
    "torch",
    "matplotlib.pyplot",
    "ipykernel.zmqshell",
    # The package, for what it imports; `use` imports its own modules anew.
    "minipaged.serving.server",
]


def fork_kernels() -> None:
    """From now on every kernel is one of these."""
    # The kernel sets it as well, but too late for a matplotlib that has been imported.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    factory = KernelProvisionerFactory.instance()
    factory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:ForkedKernel", "")
    factory.default_provisioner_name = "forked"


class ForkedKernel(LocalProvisioner):
    """Starts a kernel, and asks how it is."""

    async def launch_kernel(self, cmd, **kwargs):
        """Fork it; `cmd` would start a new interpreter."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        arguments = (self.parent.connection_file, kwargs["cwd"])
        self.process = context.Process(target=run_kernel, args=arguments)
        self.process.start()
        return self.connection_info

    async def poll(self):
        """None as long as it runs."""
        return self.process.exitcode

    async def wait(self):
        """Its exit code, when it has ended."""
        while self.process.exitcode is None:
            await asyncio.sleep(0.02)
        return self.process.exitcode

    async def send_signal(self, signum):
        """To interrupt it, or to end it."""
        os.kill(self.process.pid, signum)


def run_kernel(connection_file: str, folder: str) -> None:
    """In the new process: a kernel, until it is told to shut down."""
    gc.freeze()  # what was preloaded stays: nobody need look through it for garbage
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # else it tells the terminal how to end it
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    os.chdir(folder)
    from ipykernel.kernelapp import IPKernelApp

    # It would warn that others might listen on this machine, to what the book is to show anyway.
    IPKernelApp.launch_instance(["-f", connection_file, "--log-level=ERROR"])


def end_with_the_parent() -> None:
    """Nobody else would end a kernel whose notebook was given up in the middle."""
    multiprocessing.parent_process().join()
    os._exit(1)

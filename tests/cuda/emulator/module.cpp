// The test module: every CUDA op as in `_C.cuda`, run by the emulator, plus forward and backward with results whose
// rows lie apart (as the C++ ops allow), the emulator's own controls and the kernels with planted bugs.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/host/bindings.h"
#include "cuda/host/boundary.h"
#include "cuda/host/launch.h"
#include "emulator.h"
#include "planted.h"

namespace py = pybind11;
using sparsenet::emulator::Emulator;
using sparsenet::emulator::EmulatorError;

namespace {

using sparsenet::LinearCall;
using sparsenet::Matrix;
namespace cuda = sparsenet::cuda;

void linear_forward_into(const cuda::Pattern& pattern, const LinearCall& call, const Matrix& x,
                         const sparsenet::Weight& weight, const std::pair<Matrix, Matrix>& outputs,
                         const py::tuple& run) {
  const sparsenet::LinearForward op{.pattern = pattern.view,
                                    .dtype = call.dtype,
                                    .activation = call.activation,
                                    .x = x,
                                    .values = weight.values,
                                    .bias = weight.bias,
                                    .y = outputs.first,
                                    .pre_activation = outputs.second};
  cuda::linear_forward(op, pattern.forward, cuda::run_of(run));
}

void linear_backward_into(const cuda::Pattern& pattern, const LinearCall& call, const Matrix& x, int64_t values,
                          const std::pair<Matrix, Matrix>& upstream, const std::tuple<Matrix, int64_t, int64_t>& grads,
                          const py::tuple& run) {
  const sparsenet::LinearBackward op{.pattern = pattern.view,
                                     .dtype = call.dtype,
                                     .activation = call.activation,
                                     .grad_y = upstream.first,
                                     .saved = upstream.second,
                                     .x = x,
                                     .values = sparsenet::at(values),
                                     .grad_x = std::get<0>(grads),
                                     .grad_values = sparsenet::at(std::get<1>(grads)),
                                     .grad_bias = sparsenet::at(std::get<2>(grads))};
  cuda::linear_backward(op, pattern.transposed, cuda::run_of(run));
}

} // namespace

PYBIND11_MODULE(MODULE_NAME, module) {
  py::register_exception<EmulatorError>(module, "EmulatorError", PyExc_RuntimeError);
  sparsenet::register_cuda(module);
  module.def("linear_forward_into", linear_forward_into);
  module.def("linear_backward_into", linear_backward_into);

  module.def(
      "configure",
      [](uint64_t seed, const std::string& order, bool detect_races, bool count_bank_conflicts) {
        using sparsenet::emulator::ThreadOrder;
        Emulator::instance().options = {.seed = seed,
                                        .order = order == "forward"    ? ThreadOrder::forward
                                                 : order == "backward" ? ThreadOrder::backward
                                                                       : ThreadOrder::random,
                                        .detect_races = detect_races,
                                        .count_bank_conflicts = count_bank_conflicts};
      },
      py::arg("seed") = 0, py::arg("order") = "random", py::arg("detect_races") = true,
      py::arg("count_bank_conflicts") = false);
  module.def(
      "set_device",
      [](int arch, int num_multiprocessors, int64_t shared_bytes_per_cta) {
        sparsenet::cuda::emulated_device() = {arch, num_multiprocessors, shared_bytes_per_cta};
      },
      py::arg("arch") = 90, py::arg("num_multiprocessors") = 4, py::arg("shared_bytes_per_cta") = 227 * 1024);
  module.def(
      "add_memory",
      [](std::uintptr_t address, size_t bytes, bool writable, const std::string& name) {
        Emulator::instance().add_memory(reinterpret_cast<const void*>(address), bytes, writable, name);
      },
      py::arg("address"), py::arg("bytes"), py::arg("writable"), py::arg("name"));
  module.def("clear_memory", [] { Emulator::instance().clear_memory(); });
  module.def("launches", [] {
    py::list result;
    for (const auto& [launch, banks] : Emulator::instance().launches) {
      py::dict entry;
      entry["kernel"] = launch.kernel;
      entry["ctas"] = launch.ctas;
      entry["threads"] = launch.threads;
      entry["shared_bytes"] = launch.shared_bytes;
      entry["instructions"] = banks.instructions;
      entry["wavefronts"] = banks.wavefronts;
      entry["conflicts"] = banks.conflicts;
      entry["unmatched"] = banks.unmatched;
      result.append(entry);
    }
    Emulator::instance().launches.clear();
    return result;
  });
  module.def("totals", [] {
    Dl_info here = {};
    dladdr(reinterpret_cast<const void*>(&Emulator::instance), &here);
    py::dict result; // by the offset of the function in this module: its value in the symbol table
    for (const auto& [function, total] : Emulator::instance().totals) {
      py::dict entry;
      entry["kernel"] = total.kernel;
      entry["launches"] = total.launches;
      entry["ctas"] = total.ctas;
      entry["threads"] = total.threads;
      entry["shared_bytes"] = total.shared_bytes;
      entry["seeds"] = total.seeds.size();
      entry["sizes"] = total.sizes;
      const auto offset = static_cast<const char*>(function) - static_cast<const char*>(here.dli_fbase);
      result[py::int_(offset)] = entry;
    }
    return result;
  });
  module.def(
      "run_planted",
      [](const std::string& name, std::uintptr_t input, std::uintptr_t output, int count) {
        sparsenet::emulator::run_planted(
            name, {reinterpret_cast<const float*>(input), reinterpret_cast<float*>(output), count});
      },
      py::arg("name"), py::arg("input"), py::arg("output"), py::arg("count"));
  module.def("planted_names", &sparsenet::emulator::planted_names);
}

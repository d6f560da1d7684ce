// What Python sees of the native engine. Built under two names: _native, and _native_avx2, which
// only a processor that has AVX2 may load.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include "mean_field.hpp"

namespace nb = nanobind;
using namespace terravox;

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

namespace {

// Splits the (classes, classes) penalty into T and what the last class adds; see mean_field.hpp.
std::vector<float> relative(Kernel &kernel, const float *penalty, int classes, int width) {
    const int last = classes - 1;
    const auto mu = [&](int k, int l) { return penalty[k * classes + l]; };
    std::vector<float> constant(last);
    for (int k = 0; k < last; ++k) constant[k] = mu(last, last) - mu(k, last);
    // Potts: one value on the diagonal, one beside it.
    const float same = mu(0, 0), other = classes > 1 ? mu(0, 1) : same;
    bool potts = true;
    for (int k = 0; k < classes; ++k)
        for (int l = 0; l < classes; ++l) potts &= mu(k, l) == (k == l ? same : other);
    if (potts) {
        kernel.potts = other - same;
        return constant;
    }
    kernel.matrix.assign(width * width, 0.0f);
    for (int k = 0; k < last; ++k)
        for (int l = 0; l < last; ++l)
            kernel.matrix[k * width + l] = mu(k, last) + mu(last, l) - mu(k, l) - mu(last, last);
    return constant;
}

int rounded(int values) {
    for (int width : {1, 2, 4, 8, 12, 16, 20, 24, 32})
        if (values <= width) return width;
    return (values + 15) / 16 * 16;
}

template <int V>
void solve(const float *energy, int classes, int width, const std::vector<const float *> &features,
           const std::vector<int> &dims, const std::vector<const float *> &penalties,
           int64_t pixels, int iterations, int threads, float *prob) {
    Team team(threads);
    std::vector<Kernel> kernels(features.size());
    std::vector<std::vector<float>> constants, masses;
    for (size_t m = 0; m < kernels.size(); ++m) {
        kernels[m].plan = Plan::of(features[m], dims[m], pixels, team);
        constants.push_back(relative(kernels[m], penalties[m], classes, width));
        normalise(kernels[m], team);
        masses.push_back(filter_ones(kernels[m], team));
    }
    MeanField<V> field(energy, classes, width, kernels, team);
    field.run(iterations, masses, constants, prob);
}

nb::object mean_field(Matrix energy, std::vector<Matrix> features, std::vector<Matrix> penalties,
                      int iterations, int threads) {
    const int classes = int(energy.shape(0));
    const auto pixels = int64_t(energy.shape(1));
    auto *prob = new float[classes * pixels];
    nb::capsule owner(prob, [](void *p) noexcept { delete[] static_cast<float *>(p); });
    std::vector<const float *> feature, penalty;
    std::vector<int> dims;
    for (auto &f : features) feature.push_back(f.data()), dims.push_back(int(f.shape(0)));
    for (auto &p : penalties) penalty.push_back(p.data());
    {
        nb::gil_scoped_release release;
        const int width = rounded(classes - 1);
        const auto call = [&](auto v) {
            solve<decltype(v)::value>(energy.data(), classes, width, feature, dims, penalty, pixels,
                                      iterations, threads, prob);
        };
        switch (width) {
            case 1: call(std::integral_constant<int, 1>()); break;
            case 2: call(std::integral_constant<int, 2>()); break;
            case 4: call(std::integral_constant<int, 4>()); break;
            case 8: call(std::integral_constant<int, 8>()); break;
            case 12: call(std::integral_constant<int, 12>()); break;
            case 16: call(std::integral_constant<int, 16>()); break;
            case 20: call(std::integral_constant<int, 20>()); break;
            case 24: call(std::integral_constant<int, 24>()); break;
            case 32: call(std::integral_constant<int, 32>()); break;
            default: call(std::integral_constant<int, 0>());
        }
    }
    return nb::cast(Result(prob, {size_t(classes), size_t(pixels)}, owner));
}

}  // namespace

NB_MODULE(TERRAVOX_MODULE, module) {
    module.def("has_avx2", [] {
#ifdef __x86_64__
        return bool(__builtin_cpu_supports("avx2"));
#else
        return false;
#endif
    });
    module.def("mean_field", &mean_field, nb::arg("energy"), nb::arg("features"),
               nb::arg("penalties"), nb::arg("iterations"), nb::arg("threads"));
}

// What Python sees of the native engine. Built under two names: _native, and _native_avx2, which
// only a processor that has AVX2 may load.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "scene.hpp"
#include "shelf.hpp"

namespace nb = nanobind;
using namespace terravox;

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const uint64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

namespace {

// Sets what the kernel says about labels from their (classes, classes) penalty: see mean_field.hpp.
void set_penalty(Kernel &kernel, const float *penalty, int classes, int width) {
    const int last = classes - 1;
    const auto mu = [&](int k, int l) { return penalty[k * classes + l]; };
    // Potts: one value on the diagonal, one beside it.
    const float same = mu(0, 0), other = classes > 1 ? mu(0, 1) : same;
    bool potts = true;
    for (int k = 0; k < classes; ++k)
        for (int l = 0; l < classes; ++l) potts &= mu(k, l) == (k == l ? same : other);
    kernel.potts = other - same;
    if (potts) return;
    kernel.matrix.assign(width * width, 0.0f);
    for (int k = 0; k < last; ++k) {
        float mean = 0;
        for (int l = 0; l < classes; ++l) mean += (mu(k, l) - mu(last, l)) / float(classes);
        kernel.constant.push_back(-mean);
        for (int l = 0; l < last; ++l)
            kernel.matrix[k * width + l] = mean - (mu(k, l) - mu(last, l));
    }
}

int rounded(int values) {
    for (int width : {1, 2, 4, 8, 12, 16, 20, 24, 32})
        if (values <= width) return width;
    return (values + 15) / 16 * 16;
}

// A call's arguments.
struct Problem {
    Matrix energy;
    std::vector<Matrix> features, penalties;
    std::vector<bool> recurring;
    int iterations, threads;

    int classes() const { return int(energy.shape(0)); }
    int64_t pixels() const { return int64_t(energy.shape(1)); }
};

// The plan of kernel m with the symmetric normalisation in its weights.
void prepare(Kernel &kernel, const Problem &problem, size_t m, Shelf &shelf, Team &team) {
    const auto &features = problem.features[m];
    const int d = int(features.shape(0));
    if (problem.recurring[m]) kernel.plan = shelf.take(features.data(), d, problem.pixels());
    if (kernel.plan.pixels) return;
    kernel.plan = Plan::of(features.data(), d, problem.pixels(), team);
    normalise(kernel, filter_ones(kernel, team), team);
}

template <int V> void solve(const Problem &problem, int width, Shelf &shelf, float *prob) {
    Team team(problem.threads);
    std::vector<Kernel> kernels(problem.features.size());
    std::vector<std::vector<float>> masses(kernels.size());
    for (size_t m = 0; m < kernels.size(); ++m) {
        prepare(kernels[m], problem, m, shelf, team);
        set_penalty(kernels[m], problem.penalties[m].data(), problem.classes(), width);
        if (!kernels[m].constant.empty()) masses[m] = filter_ones(kernels[m], team);
    }
    MeanField<V> field(problem.energy.data(), problem.classes(), width, kernels, team);
    field.run(problem.iterations, masses, prob);
    for (size_t m = 0; m < kernels.size(); ++m)
        if (problem.recurring[m])
            shelf.put(problem.features[m].data(), std::move(kernels[m].plan));
}

// Calls use(integral_constant) with the width where rows of it are compiled in, else with 0.
template <class Use> auto at_width(int width, const Use &use) {
    switch (width) {
        case 1: return use(std::integral_constant<int, 1>());
        case 2: return use(std::integral_constant<int, 2>());
        case 4: return use(std::integral_constant<int, 4>());
        case 8: return use(std::integral_constant<int, 8>());
        case 12: return use(std::integral_constant<int, 12>());
        case 16: return use(std::integral_constant<int, 16>());
        case 20: return use(std::integral_constant<int, 20>());
        case 24: return use(std::integral_constant<int, 24>());
        case 32: return use(std::integral_constant<int, 32>());
        default: return use(std::integral_constant<int, 0>());
    }
}

// What Python gets in the end; freed where something goes wrong before.
struct Answer {
    size_t classes, pixels;
    std::unique_ptr<float[]> held;
    float *prob;
    Answer(size_t k, size_t n) : classes(k), pixels(n), held(new float[k * n]), prob(held.get()) {}

    nb::object array() {
        nb::capsule owner(held.release(), [](void *p) noexcept { delete[] static_cast<float *>(p); });
        return nb::cast(Result(prob, {classes, pixels}, owner));
    }
};

std::vector<const float *> pointers(const std::vector<Matrix> &arrays) {
    std::vector<const float *> found;
    for (const auto &array : arrays) found.push_back(array.data());
    return found;
}

nb::object mean_field(Shelf &shelf, Matrix energy, std::vector<Matrix> features,
                      std::vector<Matrix> penalties, std::vector<bool> recurring, int iterations,
                      int threads) {
    const Problem problem{energy, std::move(features), std::move(penalties), std::move(recurring),
                          iterations, threads};
    Answer answer(energy.shape(0), energy.shape(1));
    {
        nb::gil_scoped_release release;
        const int width = rounded(problem.classes() - 1);
        at_width(width, [&](auto v) {
            solve<decltype(v)::value>(problem, width, shelf, answer.prob);
        });
    }
    return answer.array();
}

// Rows of numbers that Python gets.
template <class T> nb::object rows_of(std::vector<T> values, size_t columns) {
    auto *held = new std::vector<T>(std::move(values));
    nb::capsule owner(held, [](void *p) noexcept { delete static_cast<std::vector<T> *>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<2>>(
        held->data(), {held->size() / columns, columns}, owner));
}

std::unique_ptr<SceneTile> place_tile(Team &team, Matrix energy, std::vector<Matrix> features,
                                      std::vector<std::vector<float>> low,
                                      std::vector<std::vector<float>> high,
                                      std::vector<Matrix> penalties) {
    nb::gil_scoped_release release;
    const int classes = int(energy.shape(0)), width = rounded(classes - 1);
    auto tile = at_width(width, [&](auto v) -> std::unique_ptr<SceneTile> {
        return std::make_unique<SceneTileOf<decltype(v)::value>>(classes, width, team);
    });
    tile->pixels.resize(low.size());
    for (size_t m = 0; m < low.size(); ++m) {
        tile->around.emplace_back(low[m], high[m]);
        set_penalty(tile->around[m].kernel, penalties[m].data(), classes, width);
        tile->pixels[m].constant = tile->around[m].kernel.constant;
    }
    tile->place(energy.data(), int64_t(energy.shape(1)), pointers(features));
    return tile;
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
    nb::class_<Shelf>(module, "Shelf")
        .def(nb::init<size_t>(), nb::arg("most_bytes"))
        .def_prop_ro("found", &Shelf::found);
    module.def("mean_field", &mean_field, nb::arg("shelf"), nb::arg("energy"), nb::arg("features"),
               nb::arg("penalties"), nb::arg("recurring"), nb::arg("iterations"),
               nb::arg("threads"));
    nb::class_<Team>(module, "Team").def(nb::init<int>(), nb::arg("threads"));
    nb::class_<SceneTile>(module, "SceneTile")
        .def_prop_ro("bytes", &SceneTile::bytes)
        .def("keys", [](const SceneTile &tile, size_t m) { return rows_of(tile.keys(m), 2); })
        .def("positions", [](const SceneTile &tile, size_t m, int axes) {
            return rows_of(tile.positions(m, axes), axes);
        }, nb::arg("m"), nb::arg("axes"))
        .def("ones", [](SceneTile &tile, size_t m) { return rows_of(tile.ones(m), 1); })
        .def("meet", [](SceneTile &tile, size_t m, Keys keys, Counts ones) {
            nb::gil_scoped_release release;
            tile.meet(m, keys.data(), int64_t(keys.shape(0)), ones.data());
        }, nb::arg("m"), nb::arg("keys"), nb::arg("ones"))
        .def("read", [](SceneTile &tile, std::vector<Counts> sums) {
            nb::gil_scoped_release release;
            std::vector<const int64_t *> found;
            for (const auto &each : sums) found.push_back(each.data());
            tile.read(found);
        }, nb::arg("sums"))
        .def("update", [](SceneTile &tile) {
            Answer answer(tile.classes, size_t(tile.pixels[0].plan.pixels));
            {
                nb::gil_scoped_release release;
                tile.update(answer.prob);
            }
            return answer.array();
        })
        .def("sums", [](SceneTile &tile, size_t m, Matrix prob) {
            return rows_of(tile.sums(m, prob.data()), tile.columns(m));
        }, nb::arg("m"), nb::arg("prob"));
    module.def("place_tile", &place_tile, nb::keep_alive<0, 1>(), nb::arg("team"),
               nb::arg("energy"), nb::arg("features"), nb::arg("low"), nb::arg("high"),
               nb::arg("penalties"));
}

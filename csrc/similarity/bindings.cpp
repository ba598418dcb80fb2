// hstu_ext._C.l2norm*, topk_*, l2norm_dot_*, sampled_softmax_* and in_batch_softmax_*. Arguments are positional;
// python/hstu_ext/_C.pyi gives their names and types.
#include "similarity/bindings.h"

#include "common/arguments.h"
#include "similarity/api.h"

namespace py = pybind11;

namespace hstu::similarity {
namespace {

int threads(Arguments& args) { return static_cast<int>(args.integer("num_threads")); }

void bind_l2norm(py::args values) {
    Arguments args("l2norm", std::move(values));
    const Tensor x = args.tensor("x"), out = args.tensor("out");
    const double eps = args.number("eps");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    l2norm(x, out, eps, execution);
}

void bind_l2norm_backward(py::args values) {
    Arguments args("l2norm", std::move(values));
    const Tensor dout = args.tensor("dout"), x = args.tensor("x"), dx = args.tensor("dx");
    const double eps = args.number("eps");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    l2norm_backward(dout, x, dx, eps, execution);
}

void bind_l2norm_dot_check(py::args values) {
    Arguments args("l2norm_dot", std::move(values));
    const Tensor q = args.tensor("q"), items = args.tensor("items");
    check_l2norm_dot(q, items, args.number("eps"));
}

void bind_advise_huge_pages(py::args values) {
    Arguments args("l2norm_dot", std::move(values));
    advise_huge_pages(args.tensor("out"));
}

TopkInputs topk_inputs(Arguments& args) {
    TopkInputs in;
    in.query = args.tensor("query");
    in.items = args.tensor("items");
    in.k = args.integer("k");
    in.exclude = args.tensor("exclude");
    in.exclude_offsets = args.tensor("exclude's offsets");
    in.valid = args.tensor("valid");
    return in;
}

TopkState topk_state(Arguments& args) {
    TopkState state;
    state.scratch = args.tensor("scratch");
    state.values = args.tensor("values");
    state.indices = args.tensor("indices");
    return state;
}

bool bind_topk_scan(py::args values) {
    Arguments args("topk_dot", std::move(values));
    const TopkInputs in = topk_inputs(args);
    const TopkState state = topk_state(args);
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    return topk_scan(in, state, execution);
}

void bind_topk_merge_scores(py::args values) {
    Arguments args("topk_dot", std::move(values));
    const TopkInputs in = topk_inputs(args);
    const Tensor scores = args.tensor("scores");
    const int64_t col0 = args.integer("col0");
    const bool last = args.boolean("last");
    const TopkState state = topk_state(args);
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    topk_merge_scores(in, scores, col0, last, state, execution);
}

void bind_topk_check(py::args values) {
    Arguments args("topk_dot", std::move(values));
    const TopkInputs in = topk_inputs(args);
    const py::gil_scoped_release no_gil;
    check_topk_dot(in);
}

void bind_topk_merge(py::args values) {
    Arguments args("topk_dot", std::move(values));
    TopkTile tile;
    tile.scores = args.tensor("scores");
    tile.col0 = args.integer("col0");
    tile.kept = args.tensor("kept");
    tile.counts = args.tensor("counts");
    tile.thresholds = args.tensor("thresholds");
    tile.excluded = args.tensor("excluded");
    tile.excluded_offsets = args.tensor("excluded_offsets");
    tile.valid = args.tensor("valid");
    tile.k = args.integer("k");
    const int num_threads = threads(args);
    const py::gil_scoped_release no_gil;
    topk_merge(tile, num_threads);
}

void bind_topk_finish(py::args values) {
    Arguments args("topk_dot", std::move(values));
    const Tensor kept = args.tensor("kept"), counts = args.tensor("counts"), out = args.tensor("values"),
                 indices = args.tensor("indices");
    const int num_threads = threads(args);
    const py::gil_scoped_release no_gil;
    topk_finish(kept, counts, out, indices, num_threads);
}

SampledInputs sampled_inputs(Arguments& args) {
    SampledInputs in;
    in.query = args.tensor("query");
    in.table = args.tensor("table");
    in.pos_ids = args.tensor("pos_ids");
    in.neg_ids = args.tensor("neg_ids");
    in.temperature = args.number("temperature");
    in.eps = args.number("eps");
    in.log_q = args.tensor("log_q");
    return in;
}

SampledGradients sampled_gradients(Arguments& args) {
    SampledGradients gradients;
    gradients.dloss = args.tensor("dloss");
    gradients.lse = args.tensor("lse");
    gradients.similarity = args.tensor("similarity");
    gradients.weight = args.tensor("weight");
    gradients.unit_query = args.tensor("unit_query");
    gradients.dquery = args.tensor("dquery");
    return gradients;
}

void bind_sampled_forward(py::args values) {
    Arguments args("sampled_softmax_loss", std::move(values));
    const SampledInputs in = sampled_inputs(args);
    const Tensor loss = args.tensor("loss"), of_rows = args.tensor("of_rows"), of_pairs = args.tensor("of_pairs");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    sampled_softmax_forward(in, loss, of_rows, of_pairs, execution);
}

int bind_sampled_sort(py::args values) {
    Arguments args("sampled_softmax_loss", std::move(values));
    const SampledInputs in = sampled_inputs(args);
    SampledPairs pairs;
    for (Tensor& items : pairs.items) items = args.tensor("pair_items");
    for (Tensor& order : pairs.order) order = args.tensor("order");
    pairs.scratch = args.tensor("scratch");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    return sampled_softmax_sort(in, pairs, execution);
}

void bind_sampled_table(py::args values) {
    Arguments args("sampled_softmax_loss", std::move(values));
    const SampledInputs in = sampled_inputs(args);
    SampledTableGradient gradient;
    gradient.dloss = args.tensor("dloss");
    gradient.dsimilarity = args.tensor("dsimilarity");
    gradient.pair_items = args.tensor("pair_items");
    gradient.order = args.tensor("order");
    gradient.pair_rows = args.tensor("pair_rows");
    gradient.row_items = args.tensor("row_items");
    gradient.chunk = args.integer("chunk");
    gradient.partial = args.tensor("partial");
    gradient.sums = args.tensor("sums");
    gradient.dtable = args.tensor("dtable");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    sampled_softmax_table(in, gradient, execution);
}

void bind_sampled_group(py::args values) {
    Arguments args("sampled_softmax_loss", std::move(values));
    const SampledInputs in = sampled_inputs(args);
    const Tensor starts = args.tensor("starts"), order = args.tensor("order");
    const py::gil_scoped_release no_gil;
    sampled_softmax_group(in, starts, order);
}

void bind_sampled_backward_query(py::args values) {
    Arguments args("sampled_softmax_loss", std::move(values));
    const SampledInputs in = sampled_inputs(args);
    const SampledGradients gradients = sampled_gradients(args);
    const int num_threads = threads(args);
    const py::gil_scoped_release no_gil;
    sampled_softmax_backward_query(in, gradients, num_threads);
}

void bind_sampled_backward_table(py::args values) {
    Arguments args("sampled_softmax_loss", std::move(values));
    const SampledInputs in = sampled_inputs(args);
    const SampledGradients gradients = sampled_gradients(args);
    const Tensor starts = args.tensor("starts"), order = args.tensor("order"), ids = args.tensor("ids"),
                 dtable = args.tensor("dtable");
    const int num_threads = threads(args);
    const py::gil_scoped_release no_gil;
    sampled_softmax_backward_table(in, gradients, starts, order, ids, dtable, num_threads);
}

InBatchInputs in_batch_inputs(Arguments& args) {
    InBatchInputs in;
    in.query = args.tensor("query");
    in.items = args.tensor("items");
    in.item_ids = args.tensor("item_ids");
    in.positives = args.tensor("positives");
    in.sequence_ids = args.tensor("sequence_ids");
    in.item_sequence_ids = args.tensor("item_sequence_ids");
    in.log_q = args.tensor("log_q");
    in.temperature = args.number("temperature");
    in.query_records = args.tensor("query_records");
    in.item_records = args.tensor("item_records");
    return in;
}

InBatchTile in_batch_tile(Arguments& args) {
    InBatchTile tile;
    tile.similarity = args.tensor("similarity");
    tile.duplicate = args.tensor("duplicate");
    tile.row0 = args.integer("row0");
    tile.col0 = args.integer("col0");
    tile.threshold = args.number("similarity_threshold");
    return tile;
}

void bind_in_batch_check(py::args values) {
    Arguments args("in_batch_softmax_loss", std::move(values));
    const InBatchInputs in = in_batch_inputs(args);
    const double eps = args.number("eps");
    const py::gil_scoped_release no_gil;
    check_in_batch_softmax(in, eps);
}

void bind_in_batch_forward(py::args values) {
    Arguments args("in_batch_softmax_loss", std::move(values));
    const InBatchInputs in = in_batch_inputs(args);
    const InBatchTile tile = in_batch_tile(args);
    const Tensor maximum = args.tensor("maximum"), sum = args.tensor("sum"),
                 positive_logit = args.tensor("positive_logit");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    in_batch_softmax_forward(in, tile, maximum, sum, positive_logit, execution);
}

void bind_in_batch_backward(py::args values) {
    Arguments args("in_batch_softmax_loss", std::move(values));
    const InBatchInputs in = in_batch_inputs(args);
    const InBatchTile tile = in_batch_tile(args);
    const Tensor dloss = args.tensor("dloss"), lse = args.tensor("lse");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    in_batch_softmax_backward(in, tile, dloss, lse, execution);
}

int64_t bind_in_batch_fused_splits(py::args values) {
    Arguments args("in_batch_softmax_loss", std::move(values));
    const Tensor rows = args.tensor("rows"), others = args.tensor("others");
    return in_batch_fused_splits(rows, others);
}

void bind_in_batch_records(py::args values) {
    Arguments args("in_batch_softmax_loss", std::move(values));
    const InBatchInputs in = in_batch_inputs(args);
    const double eps = args.number("eps");
    const Tensor slots = args.tensor("slots");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    in_batch_softmax_records(in, eps, slots, execution);
}

void bind_in_batch_fused_forward(py::args values) {
    Arguments args("in_batch_softmax_loss", std::move(values));
    const InBatchInputs in = in_batch_inputs(args);
    InBatchShares shares;
    shares.maximum = args.tensor("maximum");
    shares.sum = args.tensor("sum");
    shares.positive_logit = args.tensor("positive_logit");
    shares.loss = args.tensor("loss");
    shares.lse = args.tensor("lse");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    in_batch_fused_forward(in, shares, execution);
}

void bind_in_batch_fused_backward(py::args values) {
    Arguments args("in_batch_softmax_loss", std::move(values));
    const InBatchInputs in = in_batch_inputs(args);
    const Tensor dloss = args.tensor("dloss"), lse = args.tensor("lse"), gradient = args.tensor("gradient");
    const bool of_items = args.boolean("of_items");
    const int64_t splits = args.integer("splits");
    const Execution execution = args.execution();
    const py::gil_scoped_release no_gil;
    in_batch_fused_backward(in, dloss, lse, gradient, of_items, splits, execution);
}

}  // namespace

void register_similarity(py::module_& m) {
    m.def("l2norm", &bind_l2norm);
    m.def("l2norm_backward", &bind_l2norm_backward);
    m.def("l2norm_dot_check", &bind_l2norm_dot_check);
    m.def("advise_huge_pages", &bind_advise_huge_pages);
    m.def("topk_check", &bind_topk_check);
    m.def("topk_capacity", &topk_capacity);
    m.def("topk_scan", &bind_topk_scan);
    m.def("topk_merge_scores", &bind_topk_merge_scores);
    m.def("topk_merge", &bind_topk_merge);
    m.def("topk_finish", &bind_topk_finish);
    m.def("sampled_softmax_forward", &bind_sampled_forward);
    m.def("sampled_softmax_sort_bytes", &sampled_softmax_sort_bytes);
    m.def("sampled_softmax_sort", &bind_sampled_sort);
    m.def("sampled_softmax_table", &bind_sampled_table);
    m.def("sampled_softmax_group", &bind_sampled_group);
    m.def("sampled_softmax_backward_query", &bind_sampled_backward_query);
    m.def("sampled_softmax_backward_table", &bind_sampled_backward_table);
    m.def("in_batch_softmax_check", &bind_in_batch_check);
    m.def("in_batch_softmax_records", &bind_in_batch_records);
    m.def("in_batch_softmax_forward", &bind_in_batch_forward);
    m.def("in_batch_softmax_backward", &bind_in_batch_backward);
    m.def("in_batch_fused_splits", &bind_in_batch_fused_splits);
    m.def("in_batch_fused_forward", &bind_in_batch_fused_forward);
    m.def("in_batch_fused_backward", &bind_in_batch_fused_backward);
}

}  // namespace hstu::similarity

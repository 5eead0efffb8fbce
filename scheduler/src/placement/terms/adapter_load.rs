//! Time until a worker has the request's LoRA adapter: what its loads take, and until then another has left its place, or the
//! memory that it needs; and a quarter more where one has to begin, for what others there lose by it.

use crate::placement::Prospect;

pub(super) fn seconds(prospect: &Prospect<'_>) -> f64 {
    let adapter = prospect.request.adapter;
    prospect.worker.adapter_seconds(prospect.now, adapter, prospect.adapter_load_seconds, prospect.config)
}

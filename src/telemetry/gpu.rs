//! What is told of each GPU, for as long as its node is followed and tells it.

use forebay_backends::signals::gpu::{self, Gpu};
use metrics::Gauge;

use super::series::{self, Family, Series};

static FAMILIES: [Family; 6] = [
    Family::gauge("forebay_gpu_memory_used_bytes", "memory in use on a GPU, with what the driver reserves"),
    Family::gauge("forebay_gpu_memory_total_bytes", "memory of a GPU"),
    Family::gauge(
        "forebay_gpu_utilization_ratio",
        "share of the last sample period in which some kernel ran on the GPU",
    ),
    Family::gauge("forebay_gpu_temperature_celsius", "temperature of a GPU in degrees Celsius"),
    Family::gauge("forebay_gpu_power_watts", "power that a GPU draws in watts"),
    Family::gauge("forebay_gpu_throttled", "1 while heat or power holds a GPU below its usual speed"),
];

/// One GPU's gauges, each there while the GPU tells its value.
pub struct GpuMetrics {
    /// In the order of [`FAMILIES`].
    gauges: [Gauge; FAMILIES.len()],
    series: Series,
}

impl GpuMetrics {
    /// `gpu`: its index, as in `0` or `0:1`.
    #[must_use]
    pub fn new(node: &str, gpu: &str) -> Self {
        let series = Series::new(&[("node", node), ("gpu", gpu)]);
        let gauges = FAMILIES.each_ref().map(|family| series.gauge(family, &[], f64::NAN));
        Self { gauges, series }
    }

    #[expect(clippy::cast_precision_loss, reason = "memory is far below 2^52 bytes")]
    pub fn set(&self, gpu: &Gpu) {
        self.set_all([
            gpu.memory_used_bytes.map(|bytes| bytes as f64),
            gpu.memory_total_bytes.map(|bytes| bytes as f64),
            gpu.utilization_percent.map(|percent| f64::from(percent) / 100.0),
            gpu.temperature_celsius.map(f64::from),
            gpu.power_milliwatts.map(|milliwatts| f64::from(milliwatts) / 1000.0),
            gpu.throttle_reasons.map(|_| f64::from(u8::from(gpu::slowdown(gpu) < 1.0))),
        ]);
    }

    /// Says that nothing is known of the GPU now.
    pub fn clear(&self) {
        self.set_all([None; FAMILIES.len()]);
    }

    fn set_all(&self, values: [Option<f64>; FAMILIES.len()]) {
        for (gauge, value) in self.gauges.iter().zip(values) {
            gauge.set(value.unwrap_or(f64::NAN));
        }
    }

    /// The text of these GPUs' series.
    pub fn render<'a>(gpus: impl IntoIterator<Item = &'a Self>) -> String {
        series::render(gpus.into_iter().map(|gpu| &gpu.series))
    }
}

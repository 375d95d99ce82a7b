//! The scale axes as pictures: for each axis a PNG, in it a panel for each promise that lies on it.

use crate::record::{Axis, Row};
use plotters::prelude::*;
use plotters::style::register_font;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;

type Failure = Box<dyn Error>;

const PANEL: (u32, u32) = (420, 280);
const COLUMNS: usize = 2;
const FONT: &str = "sans-serif";
const MEDIAN: RGBColor = RGBColor(0x1f, 0x5f, 0xa8);
const TAIL: RGBColor = RGBColor(0xb0, 0x4a, 0x2a);
const GOAL: RGBColor = RGBColor(0x3a, 0x8a, 0x4a);

/// Writes `<axis>.png` into `dir` for each axis that has at least two points of a promise; gives the paths.
///
/// # Errors
/// What could not be drawn or written.
pub fn plot(rows: &[Row], dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    static FONTS: Once = Once::new();
    FONTS.call_once(|| {
        // It refuses only what is no font.
        let _ = register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
    let mut written = Vec::new();
    for axis in Axis::ALL {
        let panels = panels(rows, axis);
        if panels.is_empty() {
            continue;
        }
        let name = serde_json::to_value(axis)?.as_str().unwrap_or("axis").to_owned();
        let path = dir.join(format!("{name}.png"));
        // A picture is there whole or not at all.
        let partial = dir.join(format!("{name}.{}.tmp.png", std::process::id()));
        draw(&panels, axis, &partial)?;
        fs::rename(&partial, &path)?;
        written.push(path);
    }
    Ok(written)
}

/// The rows of each promise on an axis, in order, where there are two points at least.
fn panels(rows: &[Row], axis: Axis) -> Vec<Vec<&Row>> {
    let mut panels: Vec<Vec<&Row>> = Vec::new();
    for row in rows.iter().filter(|row| row.axis == Some(axis) && row.n > 0) {
        match panels.iter_mut().find(|panel| panel[0].promise == row.promise) {
            Some(panel) => panel.push(row),
            None => panels.push(vec![row]),
        }
    }
    panels.iter_mut().for_each(|panel| panel.sort_by_key(|row| row.at));
    panels.retain(|panel| panel.len() >= 2);
    panels
}

fn draw(panels: &[Vec<&Row>], axis: Axis, path: &Path) -> Result<(), Failure> {
    let lines = panels.len().div_ceil(COLUMNS);
    let columns = panels.len().min(COLUMNS);
    let size = (PANEL.0 * columns as u32, PANEL.1 * lines as u32);
    let root = BitMapBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, panel) in root.split_evenly((lines, columns)).iter().zip(panels) {
        draw_panel(area, panel, axis)?;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(
    area: &DrawingArea<BitMapBackend<'_>, plotters::coord::Shift>,
    rows: &[&Row],
    axis: Axis,
) -> Result<(), Failure> {
    // Evenly spaced by rank: the points of an axis are chosen, not measured.
    let places = rows.len() as f64 - 1.0;
    let label = |x: &f64| match rows.get(x.round() as usize) {
        Some(row) if (x - x.round()).abs() < 1e-6 => row.at.unwrap_or(0).to_string(),
        _ => String::new(),
    };
    let goal = rows[0].goal_p50;
    let top = rows.iter().map(|row| row.p999).chain(goal).fold(0.0, f64::max) * 1.4;
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}, {}", rows[0].promise, rows[0].unit), (FONT, 15))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d(-0.2..places + 0.2, 0.0..top.max(1e-3))?;
    let mesh = &mut chart.configure_mesh();
    mesh.disable_x_mesh().x_labels(rows.len() * 8 + 1).x_label_formatter(&label).x_desc(axis.name());
    mesh.y_labels(5).light_line_style(WHITE).label_style((FONT, 12)).axis_desc_style((FONT, 12)).draw()?;
    let line = |figure: fn(&Row) -> f64| {
        rows.iter().enumerate().map(|(x, row)| (x as f64, figure(row))).collect::<Vec<_>>()
    };
    if let Some(goal) = goal {
        let ends = [(-0.2, goal), (places + 0.2, goal)];
        let series = DashedLineSeries::new(ends, 5, 4, GOAL.stroke_width(1));
        chart.draw_series(series)?.label("goal, p50").legend(key(GOAL));
    }
    for (name, color, figure) in
        [("p50", MEDIAN, (|row| row.p50) as fn(&Row) -> f64), ("p99.9", TAIL, |row| row.p999)]
    {
        chart
            .draw_series(LineSeries::new(line(figure), color.stroke_width(2)))?
            .label(name)
            .legend(key(color));
        chart.draw_series(line(figure).into_iter().map(|at| Circle::new(at, 3, color.filled())))?;
    }
    let legend = &mut chart.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperLeft).label_font((FONT, 12)).draw()?;
    Ok(())
}

fn key(color: RGBColor) -> impl Fn((i32, i32)) -> PathElement<(i32, i32)> {
    move |(x, y)| PathElement::new([(x, y), (x + 14, y)], color.stroke_width(2))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use crate::record::{Promise, Recorder, Unit};
    use std::time::Duration;

    fn row(name: &str, axis: Axis, at: u64) -> Row {
        let promise = Promise {
            name: name.to_owned(),
            definition: "a to b".to_owned(),
            goal_p50: Some(3.0),
            goal_p999: None,
        };
        let mut recorder = Recorder::new(promise, format!("{at}"), Unit::Milliseconds).on(axis, at);
        recorder.duration(Duration::from_millis(at + 1));
        recorder.row(&Machine::of_this_host())
    }

    #[test]
    fn an_axis_with_two_points_becomes_a_small_png_and_one_point_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut rows: Vec<Row> = [64, 0, 16].map(|at| row("live fork, pause", Axis::DirtyMib, at)).into();
        rows.push(row("hibernate", Axis::DirtyMib, 4));
        rows.push(row("create, pool hit", Axis::MemoryMib, 128));
        let written = plot(&rows, dir.path()).unwrap();
        assert_eq!(written, [dir.path().join("dirty_mib.png")]);
        let bytes = std::fs::read(&written[0]).unwrap();
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() < 64 << 10, "{} bytes", bytes.len());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
